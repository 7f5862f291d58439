"""What would be lost is saved or named: wrappers, parts, statistics, layers that are gone, state of another adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import tcurlora_ext as tcur
from tcurlora_ext.adapter.files import read_adapter
from tcurlora_ext.maths.selection import RULES

from .small import CONFIG, Net, adapted


class Outer(nn.Module):
    def __init__(self, net: nn.Module, trains: bool = False) -> None:
        super().__init__()
        self.net = net
        self.temperature = nn.Parameter(torch.ones(()), requires_grad=trains)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


# -- saving -----------------------------------------------------------------------------------------------------------

WRAPPERS: list[Callable[[nn.Module], Any]] = [
    lambda net: torch.compile(net, backend="eager"), nn.DataParallel, AveragedModel, Outer,
    lambda net: Outer(nn.DataParallel(net)),
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compile", "DataParallel", "AveragedModel", "outer", "two"])
def test_a_file_saved_from_a_wrapper_is_for_the_model_in_it(
    wrap: Callable[[nn.Module], Any], x: Tensor, tmp_path: Path
) -> None:
    net = tcur.unfreeze(adapted(), "head")
    with torch.no_grad():
        net.head.weight.add_(1.0)
    path = tcur.save_adapter(wrap(net), tmp_path / "a.safetensors")
    assert torch.equal(tcur.load_adapter(Net(), path).eval()(x), net(x))
    other = wrap(tcur.unfreeze(adapted(), "head"))
    assert tcur.load_adapter(other, path) is other
    tcur.save_adapter(other, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_what_trains_around_the_adapted_model_is_named(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"the adapter of net; temperature \(1 trained parameters of Outer around it\)"
    ):
        tcur.save_adapter(Outer(adapted(), trains=True), tmp_path / "a.safetensors")


def test_parts_adapted_apart_are_both_named(tmp_path: Path) -> None:
    both = nn.ModuleDict({"encoder": adapted(), "decoder": adapted()})
    for call in (tcur.stacks, tcur.summary, tcur.merge, lambda m: tcur.save_adapter(m, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"2 adapters, encoder\.tcur_stacks and decoder\.tcur_stacks"):
            call(both)
    assert not list(tmp_path.iterdir())
    assert len(tcur.stacks(both["encoder"])) == 1


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_that_training_moved_are_in_the_file(affine: bool, x: Tensor, tmp_path: Path) -> None:
    net = tcur.inject(Net(affine), CONFIG)
    assert not any(name.startswith("state.") for name in tensors_of(net, tmp_path))
    net.train()(3 * x + 1)
    assert {"state.norm.running_mean", "state.norm.running_var"} <= tensors_of(net, tmp_path)
    loaded = tcur.load_adapter(Net(affine), tmp_path / "a.safetensors")
    assert torch.equal(loaded.eval()(x), net.eval()(x))
    assert "state.norm.running_mean" in tensors_of(loaded, tmp_path)


def tensors_of(net: nn.Module, folder: Path) -> set[str]:
    return set(safetensors.torch.load_file(tcur.save_adapter(net, folder / "a.safetensors")))


def without_last(net: Net) -> None:
    net.body = net.body[:2]


def with_another(net: Net) -> None:
    net.body[1] = nn.Linear(8, 8)


@pytest.mark.parametrize(("change", "gone"), [(without_last, r"body\.2"), (with_another, r"body\.1")])
def test_layers_that_are_gone_are_named_and_nothing_is_written(
    change: Callable[[Net], None], gone: str, tmp_path: Path
) -> None:
    net = adapted()
    change(net)
    with pytest.raises(ValueError, match=rf"^{gone} \(1 of 3 slices of stack 8x8\) is no adapted layer"):
        tcur.save_adapter(net, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_merged_models_state_says_that_it_has_the_base_weights(x: Tensor) -> None:
    net = adapted()
    right = net(x)
    tcur.merge(net)
    with pytest.warns(UserWarning, match=r"merged: its state_dict has the base weights W .* call remove\(model\)"):
        net.state_dict()
    tcur.remove(net)
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(plain(x), right)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "activation"])
def test_every_tensor_of_the_state_owns_its_memory(rule: str, tmp_path: Path) -> None:
    net = tcur.inject(Net(), tcur.TCURConfig(rank=2, target_modules=r"body\.\d", selection=rule))
    layer = tcur.TCURLinear(8, 16, rank=2, selection=rule)
    for module in (net, layer):
        for name, tensor in module.state_dict().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        safetensors.torch.save_model(module, str(tmp_path / "m.safetensors"))


def test_names_with_brackets_load_again(x: Tensor, tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a[0]": nn.Linear(8, 8), "a[1]": nn.Linear(8, 8), "qkv": nn.Linear(8, 24)})

    model = tcur.inject(net(), tcur.TCURConfig(rank=2, target_modules=r".*"))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(torch.ones(stack.slices, *stack.rank))
    loaded = tcur.load_adapter(net(), tcur.save_adapter(model, tmp_path / "a.safetensors"))
    assert isinstance(loaded, nn.ModuleDict)
    for name in ("a[0]", "a[1]", "qkv"):
        assert torch.equal(loaded[name](x), model[name](x))


# -- state that stays -------------------------------------------------------------------------------------------------


def test_an_adapter_without_a_head_is_not_loaded_over_one_with_a_head(x: Tensor, tmp_path: Path) -> None:
    headed = tcur.save_adapter(tcur.unfreeze(adapted(), "head"), tmp_path / "a.safetensors")
    plain = tcur.save_adapter(adapted(), tmp_path / "b.safetensors")
    both = tcur.load_adapter(Net(), headed).eval()
    before = both(x)
    with pytest.raises(
        ValueError, match=r"b\.safetensors does not have head\.bias, head\.weight .*load it onto the base"
    ):
        tcur.load_adapter(both, plain)
    assert torch.equal(both(x), before)


def test_the_options_of_the_adapter_loaded_last_count(tmp_path: Path) -> None:
    net = adapted(dropout=0.5)
    tcur.load_adapter(net, tcur.save_adapter(adapted(alpha=3.0), tmp_path / "b.safetensors"))
    (stack,) = tcur.stacks(net).values()
    assert (stack.options.dropout, stack.options.alpha) == (0.0, 3.0)
    assert read_adapter(tcur.save_adapter(net, tmp_path / "c.safetensors")).config.alpha == 3.0


def test_handles_of_hooks_work_after_inject_and_after_remove(x: Tensor) -> None:
    net, seen = Net().eval(), []
    before = net.body[0].register_forward_hook(lambda *_: seen.append("before"))
    tcur.inject(net, CONFIG)
    between = net.body[0].register_forward_hook(lambda *_: seen.append("between"))
    net(x)
    before.remove()
    net(x)
    tcur.remove(net)
    net(x)
    between.remove()
    net(x)
    assert seen == ["before", "between", "between", "between"]
    assert not net._forward_hooks


class TwoArguments(nn.ModuleList):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        for block in self:
            x = block(x, factor)
        return x


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.linear(x) * factor


def test_containers_keep_their_items(x: Tensor) -> None:
    model = tcur.inject(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), tcur.TCURConfig(rank=2, target_modules=["0"])
    )
    assert isinstance(model, nn.Sequential)
    assert [type(module).__name__ for module in model] == ["TCURLinear", "ReLU", "Linear"]
    assert model[:2](x).shape == (5, 8)
    model.append(nn.Identity())
    assert isinstance(model[-1], nn.Identity)
    assert len(list(tcur.remove(model).modules())) == 5
    blocks = tcur.inject(TwoArguments([Times(), Times()]), tcur.TCURConfig(rank=2, target_modules=["linear"]))
    assert blocks(x, 2.0).shape == x.shape
    named = tcur.inject(nn.ModuleDict({"a": nn.Linear(8, 8)}), tcur.TCURConfig(rank=2, target_modules=["a"]))
    assert isinstance(named, nn.ModuleDict)
    assert list(named) == ["a"]
    assert sum(p.requires_grad for p in named.parameters()) == 1


PARTS: dict[str, Callable[[Net], nn.Module]] = {
    "child": lambda net: net.body, "in a new container": lambda net: nn.Sequential(*net.body),
    "copy of a layer": lambda net: copy.deepcopy(net.body[0]),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_an_adapted_model_says_where_its_cores_are(part: Callable[[Net], nn.Module], tmp_path: Path) -> None:
    taken = part(adapted())
    for call in (tcur.stacks, tcur.summary, lambda m: tcur.save_adapter(m, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"is a part of an adapted model: the core that .* at its root"):
            call(taken)


def test_a_part_without_the_layer_that_holds_the_cores_names_that_layer(tmp_path: Path) -> None:
    model = tcur.inject(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tcur.TCURConfig(rank=2, target_modules=["0", "1"])
    )
    assert isinstance(model, nn.Sequential)
    with pytest.raises(ValueError, match=r"the core that 0 uses is registered in its 1, which is gone"):
        tcur.save_adapter(model[:1], tmp_path / "a.safetensors")


def test_statistics_moved_in_place_do_not_stay_under_an_adapter_without_them(x: Tensor, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted(), tmp_path / "a.safetensors")
    net = adapted()
    net.train()(3 * x + 1)
    with pytest.raises(ValueError, match=r"does not have norm\.num_batches_tracked, norm\.running_mean"):
        tcur.load_adapter(net, path)
    tcur.load_adapter(adapted().bfloat16(), path)  # a cast alone is no training


def test_a_head_that_is_frozen_again_is_saved(x: Tensor, tmp_path: Path) -> None:
    net = tcur.unfreeze(adapted(), "head")
    with torch.no_grad():
        net.head.weight.add_(1.0)
    path = tcur.save_adapter(net.requires_grad_(False), tmp_path / "a.safetensors")
    loaded = tcur.load_adapter(Net(), path).eval()
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(
        tcur.load_adapter(Net(), tcur.save_adapter(loaded.requires_grad_(False), path)).eval()(x), net(x)
    )


@pytest.mark.parametrize("what", ["core", "head"])
def test_values_that_no_model_could_load_are_not_written(what: str, tmp_path: Path) -> None:
    net = tcur.unfreeze(adapted(), "head")
    good = tcur.save_adapter(net, tmp_path / "a.safetensors").read_bytes()
    broken = next(iter(tcur.stacks(net).values())).core if what == "core" else net.head.bias
    with torch.no_grad():
        broken.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"(core\.8x8|trained\.head\.bias) has NaN or infinite values"):
        tcur.save_adapter(net, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == good


@pytest.mark.parametrize("wrap", WRAPPERS[:2], ids=["compile", "DataParallel"])
def test_a_file_loads_onto_a_wrapped_base(wrap: Callable[[nn.Module], Any], x: Tensor, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted(), tmp_path / "a.safetensors")
    loaded = tcur.load_adapter(wrap(Net().eval()), path)
    assert torch.equal(loaded(x), tcur.load_adapter(Net().eval(), path)(x))


@pytest.mark.parametrize(
    ("pattern", "said"), [("hed", "matches no parameter"), ("head[", "neither a prefix nor a regex")]
)
def test_unfreeze_takes_prefixes_and_refuses_what_means_nothing(pattern: str, said: str) -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    tcur.inject(net, tcur.TCURConfig(rank=2, target_modules=["head"]))
    with pytest.raises(ValueError, match=said):
        tcur.unfreeze(net, pattern)
    tcur.unfreeze(net, "a[0]")
    assert net["a[0]"].weight.requires_grad
