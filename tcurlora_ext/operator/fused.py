"""The Triton kernels as an implementation of the operators, with the arguments of eager.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients

from . import eager


def _kernels() -> Any:
    # Imported when first used: it needs the package triton.
    from tcurlora_ext.kernels import operator

    return operator


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """As eager.forward. Raises ValueError where the tensors do not fit together, before any kernel is launched."""
    eager.check(x, weight, bias, factors)
    return _kernels().forward(x, weight, bias, factors)


def backward(*arguments: Any) -> Gradients:
    """As eager.backward."""
    return _kernels().backward(*arguments)
