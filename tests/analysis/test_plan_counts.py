"""The plan's FLOPs and saved bytes against PyTorch's counts, so that no formula is tested against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tcurlora_ext as tcur
from tcurlora_ext.analysis.plan import plan
from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.transforms import TRANSFORMS
from tcurlora_ext.maths.transforms.base import phase_table
from tcurlora_ext.operator.arguments import backward_of, forward_of
from tcurlora_ext.operator.backends.eager import EAGER
from tcurlora_ext.operator.riding import products
from tcurlora_ext.operator.riding.arguments import split, split_backward

from .small import NAMES, TOKENS, Block, SiblingBlock, build, leaf, learned, meta


def riding_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return products.forward(EAGER, x, weight, bias, split(*rest)[0])


def riding_backward(*given: Any) -> tuple[Tensor, ...]:
    *tensors, adapter, needs = *given[:4], *split_backward(*given[4:])[:2]
    return products.backward(EAGER, *tensors, adapter, needs)


KERNELS: dict[str, Callable[..., Any]] = {
    "tcurlora::forward": forward_of(EAGER), "tcurlora::backward": backward_of(EAGER),
    "tcurlora::riding_forward": riding_forward, "tcurlora::riding_backward": riding_backward,
}  # fmt: skip


class InsideOperators(TorchDispatchMode):
    """Runs this package's operators as eager PyTorch operations, so that a counter sees their products.

    ``middle`` is the FLOPs of a middle product of the operator that runs, as one of block-diagonal matrices: eager's
    own, by bmm, is of padded groups of blocks.
    """

    middle: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "tcurlora":
            return func(*args, **(kwargs or {}))
        kernel = KERNELS[func._schema.name]
        if "riding" in func._schema.name:
            return kernel(*args)
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False))
        blocks = MiddleBlocks(given["core"], given["first_slice"], given["num_slices"], given["transform"])
        InsideOperators.middle = 2 * args[0].shape[:-1].numel() * (blocks.single.numel() + blocks.pair.numel())
        try:
            return kernel(*args)
        finally:
            InsideOperators.middle = None


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which counts addmm but leaves out its in-place form."""

    def addmm_(_: Any, a: tuple[int, int], b: tuple[int, int], **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def bmm(a: tuple[int, int, int], b: tuple[int, int, int], **options: Any) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2] if InsideOperators.middle is None else InsideOperators.middle

    def baddbmm(_: Any, a: tuple[int, int, int], b: tuple[int, int, int], **options: Any) -> int:
        return bmm(a, b) if InsideOperators.middle is None else 0

    counts = {torch.ops.aten.addmm_: addmm_, torch.ops.aten.bmm: bmm, torch.ops.aten.baddbmm: baddbmm}
    return FlopCounterMode(display=False, custom_mapping=counts)


def measured(
    model: nn.Module, x: Tensor, inside: Callable[[], AbstractContextManager[object]] = InsideOperators
) -> tuple[int, int, int]:
    """FLOPs forward and backward, and bytes saved beyond parameters, buffers and the constants of the transforms."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *constants(model))}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter, backward_counter = flop_counter(), flop_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter, inside():
        y = model(x)
    forward = counter.get_total_flops()
    with backward_counter, inside():
        y.sum().backward()
    return forward, backward_counter.get_total_flops(), sum(saved.values())


def constants(model: nn.Module) -> Iterator[Tensor]:
    """The memory of the cached tables of phases, of which layers use slices."""
    for stack in model.modules():
        if isinstance(stack, tcur.TCURStack):
            call = stack.options.along.call_shape(stack.slices, 1, stack.blocks)
            for slices in (stack.slices, call.blocks):
                yield from phase_table(TRANSFORMS[call.transform], slices, stack.core.device, stack.core.dtype)


def added(
    adapt: Callable[[nn.Module], object],
    block: type[nn.Module] = Block,
    inside: Callable[[], AbstractContextManager[object]] = InsideOperators,
) -> tuple[int, int, int]:
    """The FLOPs and saved bytes that an adapter adds to a frozen model."""
    model, x = build(block).requires_grad_(False), leaf()
    before = measured(model, x)
    adapt(model)
    after = measured(model, x, inside)
    forward, backward, saved = (a - b for a, b in zip(after, before, strict=True))
    return forward, backward, saved


def inject_with(config: tcur.TCURConfig) -> Callable[[nn.Module], object]:
    def adapt(model: nn.Module) -> object:
        tcur.inject(model, config, subspace=None if config.factors == "weights" else learned(config, model))
        for stack in tcur.stacks(model).values():
            nn.init.normal_(stack.core)
        return model

    return adapt


CONFIGS = {
    "plain": {},
    "uneven": {"rank": (3, 2)},
    "roles": {"stack_by": "role"},
    "single": {"stack_by": "none", "split_fused": {}},
    "dct": {"transform": "dct"},
    "identity": {"transform": "identity"},
    "identity-keeps-x": {"transform": "identity", "rank": (2, 40), "target_modules": r".*linear1"},
    "keeps-x": {"rank": 6},
    "slice-domain": {"core_domain": "slice"},
    "all": {"trainable": "all"},
    "all-keeps-x": {"trainable": "all", "rank": 6},
}
CONFIGS |= {f"dropout-{name}": {"dropout": 0.5} | CONFIGS[name] for name in ("plain", "dct", "identity", "all-keeps-x")}
CONFIGS["orthonormal"] = {"orthonormal": True}
CONFIGS["orthonormal, riding"] = {"orthonormal": True, "transform": "identity"}
CONFIGS["orthonormal, riding, dropout"] = {"orthonormal": True, "transform": "identity", "dropout": 0.5}
CONFIGS["learned"] = {"factors": "learned"}
CONFIGS["learned, own cores"] = {"factors": "learned", "transform": "identity", "stack_by": "none"}
CONFIGS["learned rows, riding"] = {"factors": "learned_rows", "transform": "identity", "stack_by": "none"}
LOW = ("plain", "roles", "all-keeps-x", "dropout-plain")
CONFIGS |= {f"low-{name}": {"frequencies": 2} | CONFIGS[name] for name in LOW}
CONFIGS["dropout-slice-domain"] = {"dropout": 0.5, "core_domain": "slice", "rank": 6}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_flops_are_those_pytorch_counts(options: dict[str, Any]) -> None:
    config = tcur.TCURConfig(**{"rank": 2, "backend": "eager"} | options)
    expected = plan(meta(), config, TOKENS).tcur
    forward, backward, _ = added(inject_with(config))
    assert (expected.forward, expected.backward) == (forward, backward)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_pytorch_counts_the_same_without_a_look_into_the_operators(options: dict[str, Any]) -> None:
    config = tcur.TCURConfig(**{"rank": 2} | options)
    expected = plan(meta(), config, TOKENS).tcur
    forward, backward, _ = added(inject_with(config), inside=nullcontext)
    assert (expected.forward, expected.backward) == (forward, backward)


def test_pytorch_counts_a_layer_of_its_own_as_planned() -> None:
    linear = nn.Linear(32, 96).requires_grad_(False)
    for trainable in ("core", "all"):
        config = tcur.TCURConfig(rank=2, trainable=trainable, target_modules=["qkv"])
        expected = plan(nn.ModuleDict({"qkv": linear}), config, TOKENS)
        layer = tcur.TCURLinear.from_linear(linear, rank=2, slices=3, trainable=trainable)
        forward, backward, _ = measured(layer, leaf(), nullcontext)
        assert forward == expected.base.forward + expected.tcur.forward
        assert backward == expected.base.backward + expected.tcur.backward


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_saved_bytes_are_those_of_the_hooks(options: dict[str, Any]) -> None:
    config = tcur.TCURConfig(**{"rank": 2, "backend": "eager"} | options)
    layers = Layers()
    expected = plan(layers, config, TOKENS).tcur
    inject_with(config)(layers)
    # A core of low frequencies also saves one float32 per slice, the weight of its self-conjugate frequency; 18 slices.
    assert 0 <= layers.saved() - expected.saved <= (4 * 18 if config.frequencies else 0)


class Layers(nn.Module):
    """The linear layers of three blocks, each called on a new input, so that all saved tensors are theirs."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = build(block).requires_grad_(False)

    def saved(self) -> int:
        layers = [module for name, module in self.blocks.named_modules() if name.endswith(tuple(NAMES))]
        inputs = [torch.randn(5, 7, layer.in_features, requires_grad=True) for layer in layers]
        return sum(measured(_Wrapped(layer, self), x)[2] for layer, x in zip(layers, inputs, strict=True))


class _Wrapped(nn.Module):
    """A layer, with the model to which its parameters and buffers belong."""

    def __init__(self, layer: nn.Module, owner: nn.Module) -> None:
        super().__init__()
        self.layer, self.owner = layer, owner

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def peft_lora(model: nn.Module, rank: int, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    peft.inject_adapter_in_model(config, model)


def test_lora_is_pefts() -> None:
    expected = plan(meta(), tcur.TCURConfig(rank=2), TOKENS, lora_rank=4).lora
    forward, backward, _ = added(lambda model: peft_lora(model, 4, NAMES))
    assert (expected.forward, expected.backward) == (forward, backward)
    layers = Layers()
    peft_lora(layers, 4, NAMES)
    assert layers.saved() == expected.saved
    assert sum(p.numel() for p in layers.parameters() if p.requires_grad) == expected.trained


@pytest.mark.parametrize("method", ["tcur", "lora"])
def test_an_input_that_several_layers_read_is_kept_once(method: str) -> None:
    # rank 24 with 9 slices: q = 216 > 32, so that tCUR keeps x as LoRA does.
    config = tcur.TCURConfig(rank=24, backend="eager")
    expected = plan(meta(SiblingBlock), config, TOKENS, lora_rank=4)
    names = ["q_proj", "k_proj", "v_proj"]
    adapt = inject_with(config) if method == "tcur" else lambda model: peft_lora(model, 4, names)
    assert added(adapt, SiblingBlock)[2] == getattr(expected, method).saved


def test_base_flops() -> None:
    expected = plan(meta(), tcur.TCURConfig(rank=2), TOKENS).base
    forward, backward, _ = measured(build().requires_grad_(False), leaf())
    assert (expected.forward, expected.backward) == (forward, backward)
