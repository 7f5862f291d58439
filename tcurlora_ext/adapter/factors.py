"""C and R of a stack: taken from its base weights, normalised, folded, and told whether they still are those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcurlora_ext.maths import packing
from tcurlora_ext.maths import scale as scaling
from tcurlora_ext.maths.selection import Selection


class StackFactors(nn.Module):
    """The part of a :class:`TCURStack` that follows from the base weights: everything but the core."""

    col: Tensor
    row: Tensor
    rows: Tensor
    columns: Tensor
    row_scores: list[float]
    column_scores: list[float]
    slices: int
    scale: float
    normalised: bool
    alpha: float
    rank_stabilised: bool
    transform: str
    core_domain: str
    frequencies: int | None

    def _take_factors(self, weights: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """C (S, out, c) and R (S, r, in), float64, normalised if this stack is; sets ``scale`` by the rule then."""
        self.row_scores, self.column_scores = selection.row_scores.tolist(), selection.column_scores.tolist()
        C = weights[:, :, selection.columns].double()
        R = weights[:, selection.rows, :].double()
        if self.normalised:
            C, R = scaling.normalise_columns(C), scaling.normalise_rows(R)
            self.scale = scaling.default_scale(
                C, R, self.alpha, self.transform, self.rank_stabilised, self.core_domain, self.frequencies
            )
        return C, R

    def factors_of(self, weights: Tensor, selection: Selection) -> dict[str, Tensor]:
        """C and R as taken from some weights; sets ``scale`` where the default rule makes it.

        Args:
            weights: (S, out, in).
            selection: Which rows and columns.

        Returns:
            ``col`` and ``row`` by name, in the weights' dtype.
        """
        return self._folded(*self._take_factors(weights, selection), weights.dtype)

    def _folded(self, C: Tensor, R: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        col = packing.fold_columns(C, self.transform, self.blocks)
        row = packing.fold_rows(R, self.transform, self.blocks)
        return {"col": col.to(dtype).contiguous(), "row": row.to(dtype).contiguous()}

    @property
    def blocks(self) -> int:
        """How many of the S blocks of the slice transform the core has, all or those of its lowest frequencies."""
        return packing.kept_blocks(self.slices, self.frequencies)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one slice."""
        return self.col.shape[0], self.row.shape[1]

    @property
    def C(self) -> Tensor:
        """The column factor (S, out, c), unfolded."""
        return packing.unfold_columns(self.col, self.slices, self.transform, self.blocks)

    @property
    def R(self) -> Tensor:
        """The row factor (S, r, in), unfolded."""
        return packing.unfold_rows(self.row, self.slices, self.transform, self.blocks)

    @property
    def _selection(self) -> Selection:
        scores = (torch.tensor(s, dtype=torch.float64) for s in (self.row_scores, self.column_scores))
        return Selection(self.rows, self.columns, *scores)

    @torch.no_grad()
    def is_of(self, weights: Tensor) -> bool:
        """Whether C and R are, bit for bit, the chosen columns and rows of some weights.

        Args:
            weights: (S, out, in).
        """
        scale, scores = self.scale, (self.row_scores, self.column_scores)
        folded = self.factors_of(weights, self._selection)
        self.scale, (self.row_scores, self.column_scores) = scale, scores
        return all(torch.equal(folded[name], getattr(self, name)) for name in folded)


def require_finite(weights: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError, with the name of the slice, where weights (S, out, in) are NaN or infinite."""
    for index, weight in enumerate(weights):
        # NaN spreads through the extremes: one pass without isfinite's mask, 8 ms instead of 41 for 3072 x 768.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            name = names[index] if names else f"slice {index}"
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, expected finite ones")
