"""C and R of a stack, taken from its base weights or learned, normalised, folded and scaled: without side effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tcurlora_ext.adapter.options import LEARNED, WEIGHTS, StackOptions
from tcurlora_ext.maths import folding
from tcurlora_ext.maths import scale as scaling
from tcurlora_ext.maths.orthonormal import orthonormal_blocks
from tcurlora_ext.maths.selection import Selection


class LearnedFactors(NamedTuple):
    """Learned factors of a stack, orthonormal at every frequency of its transform.

    Attributes:
        C: (S, out, c), float64.
        R: (S, r, in), float64.
    """

    C: Tensor
    R: Tensor


class TakenFactors(NamedTuple):
    """The factors of a stack with weights (S, out, in).

    Attributes:
        col: C folded, (out, c*S), in the weights' dtype.
        row: R folded, (r*S, in), in the weights' dtype.
        scale: The factor of C * U * R, from the options or from the default rule.
        gain: What the chosen columns were multiplied by to be those of C, float64: (c,), or (S, c, c) matrices, one for
            each slice, with ``orthonormal``.
    """

    col: Tensor
    row: Tensor
    scale: float
    gain: Tensor


def take_factors(
    weights: Tensor | Sequence[Tensor],
    selection: Selection,
    options: StackOptions,
    learned: LearnedFactors | None = None,
) -> TakenFactors:
    """The factors of a stack with these options: the chosen columns and rows of weights (S, out, in), or learned ones.

    The weights may be in several tensors, of some slices each.

    Raises ValueError where the default scale rule is asked for and the chosen columns or rows are all zero, or where
    they are to be orthonormal and depend on each other.
    """
    parts = [weights] if isinstance(weights, Tensor) else weights
    slices = sum(len(part) for part in parts)
    if learned is not None and options.factors == LEARNED:
        C, gain = learned.C, learned.C.new_ones(learned.C.shape[2])
    else:
        C = torch.cat([part[:, :, selection.columns] for part in parts]).double()
        gain = torch.ones_like(C[0, 0])
        if options.orthonormal:
            C, gain = _orthonormal(C, options, slices, "columns")
        elif options.normalised:
            gain = 1 / scaling.column_norms(C)
            C = scaling.normalise_columns(C)
    if learned is not None and options.factors != WEIGHTS:
        R = learned.R
    else:
        R = torch.cat([part[:, selection.rows, :] for part in parts]).double()
        if options.orthonormal:
            R = _orthonormal(R.mT, options, slices, "rows")[0].mT
        elif options.normalised:
            R = scaling.normalise_rows(R)
    scale = options.scale
    if scale is None:
        scale = scaling.default_scale(
            C, R, options.alpha, options.transform, options.rank_stabilised, options.core_domain, options.frequencies
        )
    blocks = options.blocks(slices)
    col = folding.fold_columns(C, options.transform, blocks).to(parts[0].dtype).contiguous()
    row = folding.fold_rows(R, options.transform, blocks).to(parts[0].dtype).contiguous()
    return TakenFactors(col, row, float(scale), gain)


def _orthonormal(factor: Tensor, options: StackOptions, slices: int, what: str) -> tuple[Tensor, Tensor]:
    """A factor (S, n, k) with columns orthonormal at every frequency, and the blocks of the matrix that made them so.

    With a core for each slice those blocks are that matrix for each slice.
    """
    blocks = folding.fold_core(factor, options.transform, options.blocks(slices))
    try:
        made, triangle = orthonormal_blocks(blocks, options.along, slices)
    except ValueError as error:
        raise ValueError(f"the chosen {what} cannot be made orthonormal: {error}; choose fewer") from None
    return folding.unfold_core(made, options.transform, slices), triangle


def require_stack(weights: Tensor) -> None:
    """Raise ValueError unless these are weights (S, out, in) of a floating dtype with values to choose by."""
    if weights.dim() != 3 or 0 in weights.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected (slices, out, in), none of them 0")
    if not weights.is_floating_point():
        raise ValueError(f"weights are {weights.dtype}, expected a floating dtype")
    if weights.is_meta:
        raise ValueError("weights are on the meta device: rows and columns are chosen from real values")


def require_finite(weights: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError, naming the slice, where weights (S, out, in) are NaN or infinite."""
    for index, weight in enumerate(weights):
        # aminmax propagates NaN: one pass without isfinite's mask, 8 ms instead of 41 ms for 3072 x 768.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            name = names[index] if names else f"slice {index}"
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, expected finite ones")
