"""The check before a measurement: every variant passes it, one whose results are wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from tcurlora_ext.bench.cases import Case, Layer, convolutions, of_layer
from tcurlora_ext.bench.memory import forward_pass
from tcurlora_ext.bench.networks import Network, Run, build
from tcurlora_ext.bench.reference import Reference
from tcurlora_ext.bench.run import run
from tcurlora_ext.bench.variants import Problem, prepare, variants

CPU = torch.device("cpu")


def checked(case: Case, network: Network) -> dict[str, float]:
    """Errors of all variants of a case."""
    reference = Reference()
    found = [variant for variant in variants(CPU) if variant.fits(case, network)]
    return {variant.name: reference.check(prepare(variant, case, network)) for variant in found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_every_variant_of_a_layer_computes_what_it_says(case: Case, mode: str, dtype: str) -> None:
    case = replace(case, mode=mode, dtype=dtype)
    errors = checked(case, build(case, CPU))
    assert {"frozen", "lora", "peft lora", "tcur eager", "tcur dense layer", "curlora dense"} <= set(errors)
    assert ("tcur transient" in errors) == (mode == "training")
    assert all(error > 0 for error in errors.values())


def test_every_variant_of_a_whole_stack() -> None:
    case = Case("stack", "stack", 16, Layer("single", 16, 40, 1, 5), rank=3, compiled=False)
    assert "tcur dense stack" in checked(case, build(case, CPU))


def test_every_variant_of_convolutions() -> None:
    """The operator and LoRA; what autograd saves for the operator is less than for LoRA, which keeps x."""
    for case, side in zip(convolutions(), (4, 16), strict=True):
        case = replace(case, tokens=side**3, rank=2)
        network = build(case, CPU)
        assert set(checked(case, network)) == {"frozen", "lora", "peft lora r=8", "peft lora r=32", "tcur eager"}
        saved = {}
        for variant in variants(CPU):
            if variant.name in ("tcur eager", "peft lora r=8"):
                saved[variant.name] = sum(forward_pass(prepare(variant, case, network)).saved.values())
        assert saved["tcur eager"] < saved["peft lora r=8"]


def test_every_variant_where_x_is_smaller_than_h() -> None:
    case = of_layer(Layer("wide", 8, 16, 1, 12), 16, rank=2, compiled=False)  # q = 24 > 8: x is kept, not h
    checked(case, build(case, CPU))


def test_variants_that_are_compiled(case: Case) -> None:
    case = replace(case, compiled=True)
    assert {"lora compiled", "tcur compiled"} <= set(checked(case, build(case, CPU)))


def test_every_variant_of_a_network_with_attention_and_norms() -> None:
    from monai.networks.blocks.transformerblock import TransformerBlock

    torch.manual_seed(0)
    module = nn.Sequential(TransformerBlock(24, 48, 2), nn.LayerNorm(24)).requires_grad_(False)
    run = Run((torch.randn(2, 5, 24, requires_grad=True),), (torch.randn(2, 5, 24),))
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    case = Case("block", "encoder", 10, rank=2, compiled=False)
    errors = checked(case, Network(module, [run], names, {"qkv": 3}))
    assert "tcur dense stack" in errors


def test_an_adapter_is_as_large_as_the_base(problem: Callable[..., Problem]) -> None:
    """Otherwise a variant that ignores its adapter could pass as one with rounding errors."""
    frozen = problem("frozen")
    inputs = frozen.network.runs[0].inputs
    (base,) = (y.detach() for y in frozen.outputs(inputs))
    for name in ("lora", "peft lora", "tcur eager", "curlora dense"):
        (y,) = (y.detach() for y in problem(name).outputs(inputs))
        assert 0.2 < float((y - base).norm() / base.norm()) < 5, name


def wrong_output(stack: nn.Module) -> None:
    adapt = stack.adapt
    object.__setattr__(stack, "adapt", lambda *arguments: 1.001 * adapt(*arguments))


def wrong_gradient(stack: nn.Module) -> None:
    core = stack.core_fourier

    def half_detached() -> torch.Tensor:
        return core().detach() + 0.5 * (core() - core().detach())

    object.__setattr__(stack, "core_fourier", half_detached)


@pytest.mark.parametrize(("spoil", "where"), [(wrong_output, "output 0"), (wrong_gradient, "the gradient of .*core")])
def test_a_wrong_variant_is_refused(
    problem: Callable[..., Problem], spoil: Callable[[nn.Module], None], where: str
) -> None:
    reference = Reference()
    reference.check(problem("tcur native"))  # the family's reference
    adapted = problem("tcur eager")
    spoil(adapted.adapted.get_submodule("fused0").stack)
    with pytest.raises(
        RuntimeError, match=f"fused r=2 T=32 training float32, tcur eager: {where} is off by .*not timed"
    ):
        reference.check(adapted)


def test_a_wrong_variant_is_not_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Problem] = []
    monkeypatch.setattr(Problem, "step", lambda problem: steps.append(problem))
    monkeypatch.setattr(
        "tcurlora_ext.bench.compared_layers.LoRA.forward",
        lambda self, x: self.base(x) + 0.999 * linear(linear(x, self.down), self.up),
    )
    (rows,) = run([case], CPU, 2, lambda variant, case: False, print)
    (wrong,) = (row for row in rows if row["variant"] == "lora")
    assert "lora: output 0 is off by" in wrong["failure"]
    assert wrong["median_ms"] == ""
    assert {problem.variant.name for problem in steps} == {"frozen"}
