"""What is compared: one layer's forward and backward in several forms, checked against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

import tcurlora_ext as tcur
from tcurlora_ext.bench.cases import Layer

# Of ||found - exact|| / ||exact||: a few roundings of the dtype, and the sums over up to 3,072 terms between them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors; all variants share them. ``core`` and ``lora`` are what trains."""

    layer: Layer
    x: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor
    col: Tensor
    row: Tensor
    core: Tensor
    lora: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, layer: Layer, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Standard normal inputs and unit-size products; a core that is not zero, so that nothing is skipped."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        m, n, q = layer.out_features, layer.in_features, layer.width
        rows = layer.slices * m
        return cls(
            layer,
            normal(layer.tokens, n).to(dtype).requires_grad_(),
            normal(layer.tokens, rows).to(dtype),
            (normal(rows, n) / n**0.5).to(dtype),
            normal(rows).to(dtype),
            (normal(m, q) / q**0.5).to(dtype),
            (normal(q, n) / n**0.5).to(dtype),
            normal(layer.stack, layer.rank, layer.rank).to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
            ((normal(q, n) / n**0.5).to(dtype).requires_grad_(), (normal(rows, q) / q**0.5).to(dtype).requires_grad_()),
        )

    def exact(self) -> Inputs:
        """The same numbers in float64, where the eager form is the reference."""
        wide = [t.detach().double() for t in (self.x, self.g, self.weight, self.bias, self.col, self.row, self.core)]
        x, g, weight, bias, col, row, core = wide
        return Inputs(self.layer, x.requires_grad_(), g, weight, bias, col, row, core.requires_grad_(), self.lora)


Forward = Callable[[Inputs], Tensor]


def frozen(inputs: Inputs) -> Tensor:
    """The floor: the frozen layer, whose input asks for a gradient."""
    return linear(inputs.x, inputs.weight, inputs.bias)


def lora(inputs: Inputs) -> Tensor:
    """Plain LoRA of rank q: the base, then x A^T B^T."""
    down, up = inputs.lora
    return linear(inputs.x, inputs.weight, inputs.bias) + linear(linear(inputs.x, down), up)


def tcur_call(backend: str, inputs: Inputs) -> Callable[[], Tensor]:
    """The operator with these arguments, by one of the backends."""
    i = inputs
    tensors = (i.x, i.weight, i.bias, i.col, i.core, i.row)
    return partial(torch.ops.tcurlora.linear.default, *tensors, 0, i.layer.slices, 1.0, "dft", backend)


def tcur_of(backend: str) -> Forward:
    """The adapter by one of its backends."""
    return lambda inputs: tcur_call(backend, inputs)()


def variants(device: torch.device) -> dict[str, Forward]:
    """Name -> forward; the backends that work on this device."""
    from tcurlora_ext.operator.available import missing

    names = [name for name in tcur.backends() if not missing(name, device.type)]
    return {"frozen": frozen, "lora": lora} | {f"tcur {name}": tcur_of(name) for name in names}


def trained(name: str, inputs: Inputs) -> list[Tensor]:
    """What asks for a gradient in a variant."""
    extra = {"frozen": [], "lora": list(inputs.lora)}.get(name, [inputs.core])
    return [inputs.x, *extra]


def check(name: str, forward: Forward, inputs: Inputs) -> None:
    """Raise RuntimeError where a tCUR variant's output or a gradient is not that of float64."""
    if not name.startswith("tcur"):
        return
    exact = inputs.exact()
    outputs = []
    for function, data in ((forward, inputs), (tcur_of("eager"), exact)):
        y = function(data)
        outputs.append((y, *torch.autograd.grad(y, (data.x, data.core), data.g)))
    for what, found, right in zip(("y", "dx", "dcore"), *outputs, strict=True):
        error = float((found.detach().double() - right.detach()).norm() / right.detach().norm())
        if not error <= TOLERANCE[inputs.x.dtype]:
            raise RuntimeError(
                f"{inputs.layer.name}, {name}: {what} is off by {error:.1e} of its norm, expected at most "
                f"{TOLERANCE[inputs.x.dtype]:.0e}; not timed"
            )
