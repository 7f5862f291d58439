"""The scale of an adapter, so that one learning rate serves networks of any width and depth.

A random-sign step of size lr on U changes a slice of W by lr * rho in root mean square over the slices (Frobenius
norm), ``rho = sqrt((1/S) sum_k |C_k|_F^2 |R_k|_F^2)`` over the S frequencies. For raw columns and rows rho is about
``S r s^2 sqrt(out in)`` with s the weights' standard deviation: it differs by orders of magnitude between networks.
LoRA of rank r0 (B = 0, A Kaiming-uniform, alpha = r0) moves a layer by ``lr * sqrt(out r0 / 3)``. The default rule
divides the columns of C and the rows of R by their norm over the whole tube and sets
``scale = alpha * sqrt(out r0 / 3) / rho`` with r0 = 8: one number a stack.

Limit: the signs of a real first step are not random. Where the chosen columns (rows) are nearly parallel the step adds
up along them and is longer than the rule's, the more so the larger r is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packing import fold_columns, fold_rows, pair_blocks

LORA_RANK = 8


def normalise_columns(C: Tensor) -> Tensor:
    """C (S, out, c) with every column divided by its norm over slices and outputs; a zero column stays zero."""
    return _divided(C, torch.linalg.vector_norm(C, dim=(0, 1), keepdim=True, dtype=torch.float64))


def normalise_rows(R: Tensor) -> Tensor:
    """R (S, r, in) with every row divided by its norm over slices and inputs; a zero row stays zero."""
    return _divided(R, torch.linalg.vector_norm(R, dim=(0, 2), keepdim=True, dtype=torch.float64))


def _divided(tensor: Tensor, norms: Tensor) -> Tensor:
    return (tensor / torch.where(norms > 0, norms, 1.0)).to(tensor.dtype)


def step_length(C: Tensor, R: Tensor, transform: str = "dft") -> float:
    """rho: RMS over the slices of |dW_l|_F for a random-sign step of size 1 on U. C (S, out, c), R (S, r, in)."""
    slices = C.shape[0]
    col = fold_columns(C.double(), transform).unflatten(1, (slices, -1))
    row = fold_rows(R.double(), transform).unflatten(0, (slices, -1))
    of_col = col.square().sum((0, 2))
    of_row = row.square().sum((1, 2))
    if transform == "dft":
        # Re and Im of a frequency act together, and the conjugate frequency once more.
        of_col, of_row = _of_frequency(of_col), _of_frequency(of_row)
    return math.sqrt(float((of_col * of_row).sum()) / slices)


def _of_frequency(energy: Tensor) -> Tensor:
    """Energies of the S real blocks -> of the S complex frequencies, in the order of the blocks."""
    slices = energy.shape[0]
    pairs = pair_blocks(slices, "dft")
    energy = energy.clone()
    energy[pairs] = energy[pairs].unflatten(0, (-1, 2)).sum(1).repeat_interleave(2)
    return energy


def default_scale(C: Tensor, R: Tensor, alpha: float = 1.0, transform: str = "dft") -> float:
    """The rule above for factors as the stack holds them. Raises ValueError where they carry no energy."""
    rho = step_length(C, R, transform)
    if rho == 0:
        raise ValueError("the chosen columns and rows are all zero: no core could change anything through them")
    return alpha * math.sqrt(C.shape[1] * LORA_RANK / 3) / rho
