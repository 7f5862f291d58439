"""What would do nothing is named: layers that are never called, entries that name nothing, weights made by hooks."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import tcurlora_ext as tcur

from .small import CONFIG, Net, adapted


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Other tests of this process compile, after which calls leave no mark."""
    counters.clear()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Linear):
    """Computes something else with its weight, which an adapter must not change silently."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


# -- without effect ---------------------------------------------------------------------------------------------------


class Functional(Net):
    """Reads the weights itself and never calls the layers, from layer ``start`` on."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.body):
            assert isinstance(layer, nn.Linear)
            x = layer(x) if i < self.start else F.linear(x, layer.weight, layer.bias)
        return self.head(x)


class Listed(Net):
    """Calls the layers through a plain list, which keeps those from before."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(self.body)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Functional, Listed])
def test_an_adapter_that_never_runs_is_named_at_the_first_call_and_in_saving(
    kind: type[Net], x: Tensor, tmp_path: Path
) -> None:
    net = tcur.unfreeze(tcur.inject(kind(), CONFIG), "head")
    message = r"body\.0, body\.1, body\.2 \(3 of 3 adapted layers\) were never called"
    with pytest.warns(UserWarning, match=message):
        net(x)
    for call in (tcur.merge, lambda m: tcur.save_adapter(m, tmp_path / "a.safetensors")):
        with pytest.warns(UserWarning, match=message):
            call(net)


def test_layers_that_are_never_called_beside_others_are_named(x: Tensor, tmp_path: Path) -> None:
    net = tcur.inject(Functional(start=2), CONFIG)
    with pytest.warns(UserWarning, match=r"^body\.2 \(1 of 3 adapted layers\) were never called"):
        net(x)
    with pytest.warns(UserWarning, match=r"^body\.2 \(1 of 3"):
        tcur.save_adapter(net, tmp_path / "a.safetensors")


def test_a_core_that_never_trained_beside_others_is_named(tmp_path: Path) -> None:
    net = tcur.inject(Net(), tcur.TCURConfig(rank=2, target_modules=r"body\.\d", stack_by="none"))
    for name, stack in tcur.stacks(net).items():
        if not name.startswith("body_1"):
            nn.init.ones_(stack.core)
    with pytest.warns(UserWarning, match=r"the cores of body_1\S* \(1 of 3 stacks\) are still zero"):
        tcur.save_adapter(net, tmp_path / "a.safetensors")
    for stack in tcur.stacks(net).values():
        stack.core.requires_grad_(bool(stack.core.any()))
    saved_silently(net, tmp_path)


def test_cores_that_no_optimizer_has_are_named_beside_a_trained_head(x: Tensor, tmp_path: Path) -> None:
    """Also after moves between dtypes, and where the trainer has cleared the gradients."""
    net = tcur.unfreeze(tcur.inject(Net(), CONFIG), ["head"])
    net(x)
    saved_silently(net, tmp_path)
    saved_silently(copy.deepcopy(net).to(torch.bfloat16), tmp_path)
    before = tcur.load_adapter(Net(), tmp_path / "a.safetensors")
    train(net, net.head.parameters(), x)
    message = r"the cores of 8x8 \(1 of 1 stacks\) are still zero, while head\.weight has changed: they got no gradient"
    for call in (tcur.merge, lambda m: tcur.save_adapter(m, tmp_path / "b.safetensors")):
        with pytest.warns(UserWarning, match=message):
            call(net)
    before(x)
    loaded = tcur.load_adapter(tcur.unfreeze(before, ["head"]), tmp_path / "b.safetensors")
    loaded(x)
    saved_silently(loaded, tmp_path)


def test_a_head_that_trains_beside_its_cores_or_beside_frozen_ones_is_saved_without_a_word(
    x: Tensor, tmp_path: Path
) -> None:
    frozen, both = (tcur.unfreeze(tcur.inject(Net(), CONFIG), ["head"]) for _ in range(2))
    for stack in tcur.stacks(frozen).values():
        stack.core.requires_grad_(False)
    for net in (frozen, both):
        train(net, [p for p in net.parameters() if p.requires_grad], x)
        saved_silently(net, tmp_path)
    head_set_by_hand = tcur.unfreeze(tcur.inject(Net(), CONFIG), ["head"])
    nn.init.ones_(head_set_by_hand.get_parameter("head.weight"))
    saved_silently(head_set_by_hand, tmp_path)


def train(net: nn.Module, parameters: Iterable[nn.Parameter], x: Tensor) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    net.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_that_runs_is_saved_without_a_word(compiled: bool, x: Tensor, tmp_path: Path) -> None:
    net = adapted()
    saved_silently(net, tmp_path)
    run = torch.compile(net, backend="eager") if compiled else net
    run(x).sum().backward()
    saved_silently(net, tmp_path)
    saved_silently(copy.deepcopy(net), tmp_path)


def saved_silently(net: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tcur.save_adapter(net, folder / "a.safetensors")


def test_a_layer_compiled_in_place_is_refused() -> None:
    net = Net()
    net.body[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"body\.1 cannot be adapted: it was compiled in place"):
        tcur.inject(net, CONFIG)
    assert all(p.requires_grad for p in net.parameters())


def test_replicas_of_data_parallel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional=False: device)
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel copies a layer, but not the core"):
        replicate.replicate(adapted(), [0, 1], detach=True)


# -- asked for and left out -------------------------------------------------------------------------------------------


def mixed() -> nn.ModuleDict:
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v")})
    net["conv"], net["attn"] = nn.Conv1d(4, 4, 1, groups=2), nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(net["v"])
    return net


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q", "kk"]}, r"target_modules has 'kk', which no module of ModuleDict is called"),
        ({"target_modules": ["q"], "exclude_modules": ["kk"]}, "exclude_modules has 'kk', which no module"),
        ({"target_modules": ["q"], "split_fused": {"qq": 2}}, "split_fused has 'qq', which no module"),
        (
            {"target_modules": ["q", "conv"]},
            "'conv', but conv cannot be adapted: it has 2 groups, .* expected groups=1",
        ),
        ({"target_modules": ["q", "v"]}, "v cannot be adapted: its weight is made anew in each call"),
        ({"target_modules": ["q", "in_proj_bias"]}, r"attn\.in_proj_bias is a parameter of a MultiheadAttention"),
        ({"target_modules": r"q|conv"}, "match 1 modules that are left out, such as conv: it has 2 groups"),
    ],
)
def test_every_entry_is_used_or_named(options: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        net = tcur.inject(mixed(), tcur.TCURConfig(rank=2, **options))
    assert tcur.summary(net).adapted == 1


def test_the_summary_says_what_is_covered() -> None:
    found = tcur.summary(adapted())
    assert (found.adapted, found.left_out) == (3, ("head",))
    assert found.coverage == pytest.approx(3 * 64 / (3 * 64 + 16))
    assert str(found).endswith(
        "adapted: 3 of 4 linear layers, 92% of their weights; left out: head (not in target_modules)"
    )


MADE_ANEW: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": weight_norm, "spectral_norm": spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", MADE_ANEW.values(), ids=MADE_ANEW)
@pytest.mark.parametrize("called", [False, True])
def test_a_weight_made_by_a_hook_is_refused_with_nothing_changed(
    make: Callable[[nn.Module], object], called: bool, x: Tensor
) -> None:
    net = Net().eval()
    make(net.body[1])
    if called:
        with torch.no_grad():
            net(x)
    before = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(ValueError, match=r"^body\.1 cannot be adapted: its weight is made anew in each call"):
        tcur.inject(net, CONFIG)
    assert all(p.requires_grad for p in net.parameters())
    assert {name: type(module) for name, module in net.named_modules()} == before


def test_what_a_layer_is_is_said_by_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"0 cannot be adapted: its weight is torch\.complex64, expected a floating"):
        tcur.inject(nn.Sequential(nn.Linear(8, 8)).to(torch.complex64), tcur.TCURConfig(rank=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"found test_silence\S*\.Scaled|found \S+\.Scaled, expected nn\.Linear"):
        tcur.inject(nn.Sequential(Scaled(8, 8)), tcur.TCURConfig(rank=2, target_modules=["0"]))


# -- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("change", [lambda y: F.relu(y, inplace=True), lambda y: y.add_(1.0), lambda y: y.mul_(2.0)])
def test_the_output_of_an_adapted_layer_may_be_changed_in_place(
    backend: str, change: Callable[[Tensor], Tensor]
) -> None:
    if not tcur.backends()[backend]:
        pytest.skip(f"{backend} is not available")
    linear, x = nn.Linear(8, 8), torch.randn(2, 3, 8)
    gradients = []
    for out_of_place in (True, False):
        layer = tcur.TCURLinear.from_linear(linear, rank=2, backend=backend)
        y = layer(x)
        change(y.clone() if out_of_place else y).square().sum().backward()
        gradients.append(layer.stack.core.grad)
    assert torch.equal(*gradients)


def test_blocks_compiled_one_by_one_and_parts_of_a_loaded_model_are_no_alarm(x: Tensor, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted(), tmp_path / "a.safetensors")
    loaded = tcur.load_adapter(Net(), path)
    assert isinstance(loaded, Net)
    net = adapted()
    for layer in net.body:
        layer.compile(backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded.body[0](x)
        tcur.merge(loaded)
        net(x).sum().backward()
        tcur.save_adapter(net, path)
    assert not any("never called" in str(one.message) for one in said)
