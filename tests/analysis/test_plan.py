"""The plan's counts against PyTorch's counts on real models, so that no formula is tested against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tcurlora_ext as tcur
from tcurlora_ext.analysis.plan import Plan, plan, trace_calls
from tcurlora_ext.io.table import text_table
from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.transforms import TRANSFORMS
from tcurlora_ext.maths.transforms.base import phase_table
from tcurlora_ext.operator.arguments import backward_of, forward_of
from tcurlora_ext.operator.backends.eager import EAGER
from tcurlora_ext.operator.riding import products
from tcurlora_ext.operator.riding.arguments import split, split_backward

TOKENS = 35
NAMES = ["qkv", "out_proj", "linear1", "linear2"]


class Block(nn.Module):
    """A fused projection, an output projection of the same width, and an MLP."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(width, 2 * width), "linear2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["out_proj"](q * k + v)
        return x + self.mlp["linear2"](nn.functional.gelu(self.mlp["linear1"](x)))


class SiblingBlock(nn.Module):
    """q, k and v as three layers with the same input."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj")})

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.attn["q_proj"](x) * self.attn["k_proj"](x) + self.attn["v_proj"](x)


def build(block: type[nn.Module] = Block, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[block() for _ in range(depth)])


def meta(block: type[nn.Module] = Block, depth: int = 3) -> nn.Module:
    with torch.device("meta"):
        return build(block, depth)


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


def leaf() -> Tensor:
    return torch.randn(5, 7, 32, requires_grad=True)


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


def learned(config: tcur.TCURConfig, model: nn.Module, **options: Any) -> tcur.Subspace:
    x = torch.linspace(-2, 2, 4 * 3 * 32).view(4, 3, 32).sin()
    step = lambda model: getattr(model, "blocks", model)(x).square().mean()  # noqa: E731
    return tcur.learn_factors(model, config, step, 3, **options)


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


def test_lora_file_is_about_what_peft_writes(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    expected = plan(meta(), tcur.TCURConfig(rank=2), TOKENS, lora_rank=4).lora
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=NAMES))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert expected.file == pytest.approx(size, rel=0.05)


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


def test_traced_calls_say_the_same_as_a_number_of_tokens() -> None:
    config = tcur.TCURConfig(rank=2)
    for block in (Block, SiblingBlock):
        model = meta(block)
        calls = trace_calls(model, config, torch.empty(5, 7, 32, device="meta"))
        assert plan(model, config, calls).rows() == plan(model, config, TOKENS).rows()
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_not_called_is_named() -> None:
    model = build()
    model[0].extra = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(32, 32)})})
    config = tcur.TCURConfig(rank=2)
    with pytest.raises(ValueError, match=r"0\.extra\.attn\.q_proj is a target, but the traced forward pass"):
        plan(model, config, trace_calls(model, config, leaf()))


@pytest.mark.parametrize("options", [{}, {"trainable": "all"}, {"rank": (3, 2), "stack_by": "none"}])
def test_trained_parameters_factors_and_file_are_those_of_the_adapter(options: dict[str, Any], tmp_path: Any) -> None:
    config = tcur.TCURConfig(**{"rank": 2} | options)
    expected = plan(meta(depth=8), config, TOKENS)
    model = tcur.inject(build(depth=8), config)
    summary = tcur.summary(model)
    assert expected.tcur.trained == summary.trained
    assert [(s.name, s.slices, s.q) for s in expected.stacks] == [(s.name, s.slices, s.q) for s in summary.stacks]
    factors = sum(b.nbytes for n, b in model.named_buffers() if n.endswith((".col", ".row")))
    assert expected.tcur.factors == factors
    for stack in tcur.stacks(model).values():
        nn.init.normal_(stack.core)
    size = tcur.save_adapter(model, tmp_path / "adapter.safetensors").stat().st_size
    assert expected.tcur.file == pytest.approx(size, rel=0.03)


def test_the_papers_setting() -> None:
    """UNETR ViT-B, arXiv 2501.02227: 72 r^2 trained parameters in three stacks."""
    networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
    pytest.importorskip("monai")
    with torch.device("meta"):
        model = networks.build_network(networks.NetworkConfig("unetr", 1, 2, (96, 96, 96)))
    found = plan(model, tcur.TCURConfig(rank=8), tokens=216)
    assert {s.shape: s.slices for s in found.stacks} == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    assert found.tcur.trained == 4608
    assert {s.shape: s.q for s in found.stacks} == {(768, 768): 384, (3072, 768): 96, (768, 3072): 96}
    assert {s.crossover for s in found.stacks if s.slices == 48} == {384}


def test_totals_are_the_sums_of_the_stacks() -> None:
    found = plan(meta(), tcur.TCURConfig(rank=2), TOKENS)
    for kind in ("base", "tcur", "lora"):
        whole = getattr(found, kind)
        for name in ("trained", "forward", "backward", "saved", "factors"):
            assert getattr(whole, name) == sum(getattr(getattr(s, kind), name) for s in found.stacks)
    common = found.tcur.file - sum(s.tcur.file for s in found.stacks)
    assert 0 < common < 1500  # the configuration stands in the file once


def test_the_dtype_halves_what_is_saved_but_not_the_core() -> None:
    config = tcur.TCURConfig(rank=2)
    wide, narrow = (plan(meta(), config, TOKENS, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert (narrow.tcur.saved, narrow.lora.saved) == (wide.tcur.saved // 2, wide.lora.saved // 2)
    assert (narrow.tcur.trained, narrow.dtype) == (wide.tcur.trained, "bfloat16")


def test_the_short_table_has_whole_names_in_80_columns() -> None:
    towers = {
        name: nn.ModuleList([nn.Linear(8, 8) for _ in "12"]) for name in ("a_tower_of_the_encoder", "a_tower_of_text")
    }
    found = plan(nn.ModuleDict(towers), tcur.TCURConfig(rank=2, target_modules=["0", "1"]), 16)
    lines = found.brief()
    names = ["".join(line[0] for line in lines[first : first + 3]) for first in range(1, len(lines), 3)]
    assert names == ["a_tower_of_the_encoder_8x8", "a_tower_of_text_8x8", "total"]
    assert max(map(len, text_table(lines[0], lines[1:]).splitlines())) <= 80


def test_text_and_rows() -> None:
    found: Plan = plan(meta(), tcur.TCURConfig(rank=2), TOKENS)
    text = str(found).splitlines()
    assert len(text) == 1 + 3 * (len(found.stacks) + 1)
    assert "32 x 32" in text[1]
    assert "tcur" in text[2]
    assert [row["method"] for row in found.rows()] == ["base", "tcur", "lora"] * (len(found.stacks) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": tcur.TCURConfig(rank=33)}, r"stack 32x32 \(0.attn.qkv, ...\): rank \(c, r\) = \(33, 33\)"),
        ({"config": tcur.TCURConfig(target_modules=["nothing"])}, "match none of the 12 linear layers"),
        ({"tokens": 0}, "tokens is 0, expected a positive"),
        ({"lora_rank": 0}, "lora_rank is 0, expected a positive"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(meta(), **{"config": tcur.TCURConfig(rank=2)} | change)


def test_an_adapted_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.attn\.qkv of Sequential is adapted already"):
        plan(tcur.inject(build(), tcur.TCURConfig(rank=2)))


LEARNED: dict[str, dict[str, Any]] = {
    "coupled": {"factors": "learned"},
    "own cores": {"factors": "learned", "transform": "identity", "stack_by": "none", "rank": 8},
    "rows alone": {"factors": "learned_rows", "transform": "identity", "stack_by": "none", "rank": 8},
    "trained factors": {"factors": "learned", "trainable": "all"},
}


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED)
def test_files_of_learned_factors_are_those_written(options: dict[str, Any], bits: int, tmp_path: Path) -> None:
    config = tcur.TCURConfig(**{"rank": 2, "target_modules": "|".join([r".*\.linear1", r".*out_proj"])} | options)
    expected = plan(meta(depth=8), config, TOKENS, bits=bits)
    subspace = learned(config, build(depth=8), bits=bits)
    model = tcur.inject(build(depth=8), subspace=subspace)
    for stack in tcur.stacks(model).values():
        for parameter in stack.parameters():  # as training leaves them
            nn.init.normal_(parameter)
    assert expected.tcur.trained == tcur.summary(model).trained
    assert expected.learned is not None
    whole = tcur.save_adapter(model, tmp_path / "adapter.safetensors").stat().st_size
    cores = tcur.save_adapter(model, tmp_path / "cores.safetensors", include_subspace=False).stat().st_size
    alone = subspace.save(tmp_path / "subspace.safetensors").stat().st_size
    assert expected.tcur.file == expected.learned.adapter_file == pytest.approx(whole, rel=0.06)
    assert expected.learned.cores_file == pytest.approx(cores, rel=0.06)
    assert expected.learned.subspace_file == pytest.approx(alone, rel=0.06)
    factors = sum(b.nbytes for n, b in model.named_buffers() if n.endswith((".col", ".row")))
    assert expected.tcur.factors == factors
    assert plan(meta(), tcur.TCURConfig(rank=2), TOKENS).learned is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_warm_up_is_that_of_its_optimizer(dtype: torch.dtype) -> None:
    config = tcur.TCURConfig.preset("learned", rank=2)
    found = plan(meta().to(dtype), config, TOKENS, parts=3).learned
    assert found is not None
    x = torch.linspace(-2, 2, 4 * 3 * 32).view(4, 3, 32).sin().to(dtype)
    made: list[torch.optim.Optimizer] = []
    gradients: list[int] = []

    def step(model: nn.Module) -> Tensor:
        held = [p.grad for p in model.parameters() if p.grad is not None]
        copies = [p.grad for group in made[-1].param_groups for p in group["params"] if p.grad is not None]
        gradients.append(sum({t.data_ptr(): t.nbytes for t in (*held, *copies)}.values()))
        return model(x).float().square().mean()

    def measured(kind: Any, parts: int) -> tuple[int, int]:
        made.clear()
        gradients.clear()

        def make(parameters: Any) -> torch.optim.Optimizer:
            made.append(kind(parameters, lr=1e-3))
            return made[-1]

        tcur.learn_factors(build().to(dtype), config, step, 3, optimizer=make, parts=parts)
        states = [[t for s in opt.state.values() for t in s.values() if t.numel() > 1] for opt in made]
        return max(gradients), max(sum(t.nbytes for t in state) for state in states)

    for name, kind, parts in (
        ("Adam, all layers at once", torch.optim.Adam, 1),
        ("Adam, in 3 parts", torch.optim.Adam, 3),
        ("factored moments, all at once", torch.optim.Adafactor, 1),
        ("factored moments, in 3 parts", torch.optim.Adafactor, 3),
    ):
        warmup = found.warmups[name]
        assert (warmup.gradients, warmup.moments) == measured(kind, parts), name
        assert name in str(found)
    weights = sum(p.numel() for n, p in build().named_parameters() if n.endswith("weight"))
    assert found.warmups["Adam, all layers at once"].moments == 2 * weights * 4
