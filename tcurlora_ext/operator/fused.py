"""The Triton kernels as an implementation of the operators, with the arguments of eager.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import eager


def _kernels() -> Any:
    # Imported when first used: it needs the package triton.
    from tcurlora_ext.kernels import operator

    return operator


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first: int,
    n: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """As eager.forward. Raises ValueError where the tensors do not fit together, before any kernel is launched."""
    eager.check(x, weight, bias, col, core, row, n)
    eager.check_slices(core.shape[0], first, n)
    return _kernels().forward(x, weight, bias, col, core, row, first, n, *rest)


def backward(*arguments: Any) -> eager.Gradients:
    """As eager.backward."""
    return _kernels().backward(*arguments)
