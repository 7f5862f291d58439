"""From the flat arguments of ``torch.ops.tcurlora.*``, trailing defaults left out, to those of an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients


def forward_arguments(
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str = "dft",
    backend: str = "auto",
) -> tuple[Factors, str]:
    """What follows x, weight and bias: the factors, and the backend's name."""
    return Factors(col, core, row, first_slice, num_slices, scale, transform), backend


def backward_arguments(*rest: Any) -> tuple[Factors, list[bool], str]:
    """What follows g, x, h and weight: as of forward, with the gradients that are asked for behind the scale."""
    factors, backend = forward_arguments(*rest[:6], *rest[7:])
    return factors, rest[6], backend


def forward_of(implementation: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An implementation's ``forward`` with the operator's arguments."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return implementation.forward(x, weight, bias, forward_arguments(*rest)[0])

    return forward


def backward_of(implementation: Any) -> Callable[..., Gradients]:
    """An implementation's ``backward`` with the operator's arguments."""

    def backward(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
        factors, needs, _ = backward_arguments(*rest)
        return implementation.backward(g, x, h, weight, factors, needs)

    return backward
