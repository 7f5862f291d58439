"""The definition as the paper writes it: slow and dense, but easy to check by reading.

Every fast form of this package is tested against these functions in float64. ``C`` is (S, out, c), ``core`` (the
paper's U) (S, c, r), ``R`` (S, r, in). Source: tCURLoRA, arXiv 2501.02227v3, Eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tproduct import tpinv


def circular_convolution(a: Tensor, b: Tensor) -> Tensor:
    """The t-product ``(a * b)_l = sum_{i + j = l mod S} a_i b_j``, term by term.

    Args:
        a: (S, m, p).
        b: (S, p, n).

    Returns:
        (S, m, n).
    """
    slices = a.shape[0]
    return torch.stack(
        [torch.stack([a[i] @ b[(slot - i) % slices] for i in range(slices)]).sum(0) for slot in range(slices)]
    )


def delta_weights(C: Tensor, core: Tensor, R: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * C * U * R`` for every slice.

    Args:
        C: (S, out, c).
        core: U (S, c, r).
        R: (S, r, in).
        scale: Multiplies the result.

    Returns:
        dW (S, out, in).
    """
    return scale * circular_convolution(circular_convolution(C, core), R)


def tcur_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    C: Tensor,
    core: Tensor,
    R: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
) -> Tensor:
    """``x (W + dW)^T + bias`` with dW materialised.

    Args:
        x: (..., in).
        weight: (num_slices*out, in): slices first_slice, first_slice+1, ... stacked by rows.
        bias: (num_slices*out,) or None.
        C: (S, out, c).
        core: U (S, c, r).
        R: (S, r, in).
        first_slice: The layer's first slice, from 0.
        num_slices: How many slices it has.
        scale: Multiplies dW.

    Returns:
        (..., num_slices*out).
    """
    delta = delta_weights(C, core, R, scale)[first_slice : first_slice + num_slices]
    return torch.nn.functional.linear(x, weight + delta.reshape(weight.shape), bias)


def cur_reconstruction(weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The t-CUR decomposition ``C * pinv(W[:, rows, columns]) * R`` of weights.

    Args:
        weights: W (S, out, in).
        rows: Indices of output features.
        columns: Indices of input features.

    Returns:
        (S, out, in). This is W itself where ``W[:, rows, columns]`` has the rank of W in every frequency.
    """
    C, R = weights[:, :, columns], weights[:, rows, :]
    return circular_convolution(circular_convolution(C, tpinv(C[:, rows, :])), R)
