"""A stack: same-shaped frozen weights as slices of one tensor, and the one core they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.maths import packing
from tcurlora_ext.maths import scale as scaling
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.selection import Selection, select
from tcurlora_ext.operator.functional import tcur_delta, tcur_linear

from .config import Rank, fitting_pair
from .reloaded import Reloaded


class TCURStack(nn.Module):
    """``W' = W + scale * C * U * R`` for S weights of one shape; what its layers share.

    slices    S, the number of weights
    core      nn.Parameter (S, c, r), with ``frequencies`` fewer blocks of it, real, at least float32, zero at the
              start, in ``core_domain``
    col, row  folded factors (out, c*S) and (r*S, in) in the weights' dtype: frozen buffers, or parameters where
              ``trainable="all"``; see :mod:`tcurlora_ext.maths.packing`
    rows, columns   chosen output and input features (int64);  row_scores, column_scores: why (lists of float)
    scale, names    one number; the module name of each slice, in the order of the slices
    normalised      whether columns of C and rows of R have unit norm over the stack
    """

    core: nn.Parameter
    col: Tensor
    row: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        weights: Tensor,
        selection: Selection,
        *,
        scale: float | None,
        alpha: float = 1.0,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        rule: str = "norm",
        seed: int = 0,
        transform: str = "dft",
        core_domain: str = "fourier",
        trainable: str = "core",
        backend: str = "auto",
        frequencies: int | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.normalised = scale is None
        self.scale = 1.0 if scale is None else float(scale)
        self.alpha, self.rank_stabilised, self.dropout = alpha, rank_stabilised, dropout
        self.rule, self.seed = rule, seed
        self.transform, self.core_domain, self.trainable, self.backend = transform, core_domain, trainable, backend
        self.frequencies, self.slices = frequencies, weights.shape[0]
        self.names = list(names)
        self.reloaded = Reloaded()
        self.register_buffer("rows", selection.rows)
        self.register_buffer("columns", selection.columns)
        wide = torch.promote_types(weights.dtype, torch.float32)
        shape = (packing.kept_blocks(self.slices, frequencies), len(selection.columns), len(selection.rows))
        self.core = nn.Parameter(torch.zeros(shape, dtype=wide, device=weights.device))
        for name, folded in self.factors_of(weights, selection).items():
            if trainable == "all":
                setattr(self, name, nn.Parameter(folded.to(wide)))
            else:
                self.register_buffer(name, folded)

    @classmethod
    def from_weights(
        cls,
        weights: Tensor,
        rank: Rank = 8,
        selection: str | Selection = "norm",
        scale: float | None = 1.0,
        *,
        inputs: Tensor | None = None,
        alpha: float = 1.0,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        transform: str = "dft",
        core_domain: str = "fourier",
        trainable: str = "core",
        backend: str = "auto",
        frequencies: int | None = None,
        names: Sequence[str] = (),
    ) -> TCURStack:
        """The stack of weights (S, out, in), any floating dtype and device.

        ``selection`` is a rule's name or a :class:`Selection` made before; ``inputs`` (S, in) are the root mean squares
        of the input features, for "activation"; ``scale`` a number for raw factors, None for
        unit-norm factors and the default rule. Raises ValueError for another shape, a rank larger than the matrix, and
        weights that are not finite.
        """
        if weights.dim() != 3 or 0 in weights.shape:
            raise ValueError(f"weights have shape {tuple(weights.shape)}, expected (slices, out, in), none of them 0")
        if not weights.is_floating_point():
            raise ValueError(f"weights are {weights.dtype}, expected a floating dtype")
        if weights.is_meta:
            raise ValueError("weights are on the meta device: rows and columns are chosen from real values")
        _, out_features, in_features = weights.shape
        c, r = fitting_pair(rank, (out_features, in_features))
        require_finite(weights, names)
        rule = selection if isinstance(selection, str) else "norm"
        chosen = select(weights, c, r, rule, seed, inputs) if isinstance(selection, str) else selection
        return cls(
            weights.detach(),
            chosen,
            scale=scale,
            alpha=alpha,
            rank_stabilised=rank_stabilised,
            dropout=dropout,
            rule=rule,
            seed=seed,
            transform=transform,
            core_domain=core_domain,
            trainable=trainable,
            backend=backend,
            frequencies=frequencies,
            names=names,
        )

    # -- factors ------------------------------------------------------------------------------------------------------

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
        """``col`` and ``row`` as taken from weights (S, out, in); sets ``scale`` where the rule makes it."""
        return self._folded(*self._take_factors(weights, selection), weights.dtype)

    def _folded(self, C: Tensor, R: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        blocks = packing.kept_blocks(self.slices, self.frequencies)
        col, row = packing.fold_columns(C, self.transform, blocks), packing.fold_rows(R, self.transform, blocks)
        return {"col": col.to(dtype).contiguous(), "row": row.to(dtype).contiguous()}

    @property
    def blocks(self) -> int:
        """How many of the S blocks of the slice transform the core has: all, or those of its lowest frequencies."""
        return self.core.shape[0]

    @property
    def rank(self) -> tuple[int, int]:
        """(c, r)."""
        return self.core.shape[1], self.core.shape[2]

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

    # -- the core -----------------------------------------------------------------------------------------------------

    def core_slices(self) -> Tensor:
        """The paper's U (S, c, r), whatever the domain; differentiable."""
        return self.core if self.core_domain == "slice" else packing.unfold_core(self.core, self.transform, self.slices)

    def core_fourier(self) -> Tensor:
        """The orthonormal slice transform of U (S, c, r): what the operator takes; differentiable."""
        return self.core if self.core_domain == "fourier" else packing.fold_core(self.core, self.transform)

    @torch.no_grad()
    def set_core_slices(self, core: Tensor) -> None:
        """Set U (S, c, r), of which a core of low frequencies takes these alone.

        Raises ValueError for another shape or values that are not finite.
        """
        expected = (self.slices, *self.rank)
        if core.shape != expected:
            raise ValueError(f"core has shape {tuple(core.shape)}, expected {expected}")
        if not bool(torch.isfinite(core).all()):
            raise ValueError("core has NaN or infinite values, expected finite ones")
        core = core.to(self.core)
        in_slices = self.core_domain == "slice"
        self.core.copy_(core if in_slices else packing.fold_core(core, self.transform, self.blocks))

    # -- use ----------------------------------------------------------------------------------------------------------

    def adapt(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first_slice: int,
        num_slices: int,
        training: bool = False,
    ) -> Tensor:
        """``x W^T + bias`` plus the adapter, for slices whose weights stand in ``weight`` (num_slices*out, in).

        In ``training`` the adapter's x goes through dropout, and the base's does not.
        """
        if training and self.dropout > 0:
            return nn.functional.linear(x, weight, bias) + self.change(x, first_slice, num_slices, training)
        calls = self._calls(first_slice, num_slices, weight.dtype)
        if len(calls) == 1:
            return self._linear(x, weight, bias, calls[0])
        biases = [None] * len(calls) if bias is None else bias.chunk(len(calls))
        parts = zip(calls, weight.chunk(len(calls)), biases, strict=True)
        return torch.cat([self._linear(x, part, part_bias, call) for call, part, part_bias in parts], -1)

    def change(self, x: Tensor, first_slice: int, num_slices: int, training: bool = False) -> Tensor:
        """The adapter's part of :meth:`adapt` alone: x (..., in) -> (..., num_slices*out), in the dtype of x.

        For what cannot be fused with the base product: a dropped x, a quantised base, some rows of a batch.
        """
        if training and self.dropout > 0:
            x = nn.functional.dropout(x, self.dropout)
        calls = self._calls(first_slice, num_slices, x.dtype)
        changes = [tcur_delta(x, *call) for call in calls]
        return changes[0] if len(changes) == 1 else torch.cat(changes, -1)

    def _calls(self, first_slice: int, num_slices: int, dtype: torch.dtype) -> list[Factors]:
        """What the operator takes for these slices: one call, or one a slice where its core is one of its own.

        Without a transform every slice is a stack of one slice, whose DFT does nothing.
        """
        core, col, row = self.core_fourier(), self.col, self.row
        if col.dtype != dtype:
            col, row = col.to(dtype), row.to(dtype)
        if self.transform != "identity" and core.shape[0] == self.slices:
            return [Factors(col, core, row, first_slice, num_slices, self.scale, self.transform)]
        layers = range(first_slice, first_slice + num_slices)
        if self.transform == "identity":
            return [Factors(*self._slice_factors(col, core, row, layer), 0, 1, self.scale) for layer in layers]
        return [Factors(col, packing.core_at(core, layer, self.slices), row, 0, 1, self.scale) for layer in layers]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Factors) -> Tensor:
        """One call of the operator."""
        return tcur_linear(x, weight, bias, *call[:6], self.backend, call.transform)

    def _slice_factors(self, col: Tensor, core: Tensor, row: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of one slice without a transform: a stack of its own of one slice."""
        c, r = self.rank
        return col[:, at * c : (at + 1) * c], core[at : at + 1], row[at * r : (at + 1) * r]

    def delta_weights(self, layers: range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """``scale * C * U * R``, dense: (S, out, in), or only the slices of ``layers``; differentiable.

        The definition: for inspection, merging and tests, not the path of training. ``dtype`` is that of the
        computation and of the result (default: the core's).
        """
        dtype = dtype or self.core.dtype
        left = packing.slice_product(self.C.to(dtype), self.core_slices().to(dtype), self.transform)
        right = self.R.to(dtype)
        if layers is None:
            return self.scale * packing.slice_product(left, right, self.transform)
        return self.scale * packing.slice_product_at(left, right, layers, self.transform)

    # -- module machinery ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TCURStack:
        """As nn.Module's, but what is trained stays in at least float32 under ``.half()`` and ``.bfloat16()``."""
        trained = {id(p) for p in self.parameters()} | {id(p.grad) for p in self.parameters() if p.grad is not None}

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in trained and moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(wide, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor(self.scale, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        reloaded, self.reloaded = self.reloaded, Reloaded()
        if not any(key.startswith(prefix) for key in state_dict):
            # The state of a model that is not adapted: the layers, which come before their stack, have it by now.
            weights = reloaded.weights(self.slices)
            if weights is not None and reloaded.changed:
                self.follow_base(weights)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "scale" in state_dict:
            self.scale = float(state_dict[prefix + "scale"])
            if prefix + "scale" in unexpected_keys:
                unexpected_keys.remove(prefix + "scale")
        else:
            missing_keys.append(prefix + "scale")

    @property
    def _selection(self) -> Selection:
        scores = (torch.tensor(s, dtype=torch.float64) for s in (self.row_scores, self.column_scores))
        return Selection(self.rows, self.columns, *scores)

    @torch.no_grad()
    def is_of(self, weights: Tensor) -> bool:
        """Whether C and R are, bit for bit, the chosen columns and rows of weights (S, out, in)."""
        scale, scores = self.scale, (self.row_scores, self.column_scores)
        folded = self.factors_of(weights, self._selection)
        self.scale, (self.row_scores, self.column_scores) = scale, scores
        return all(torch.equal(folded[name], getattr(self, name)) for name in folded)

    @torch.no_grad()
    def follow_base(self, weights: Tensor) -> None:
        """Choose and take rows and columns anew from weights (S, out, in), where these changed and U is still zero.

        Chosen by "activation" they are taken anew, but stay: the calibration inputs are gone.
        A core that is not zero belongs to the weights it was trained on: then a warning, and the factors stay.
        """
        if self.is_of(weights):
            return
        if bool(self.core.any()):
            warnings.warn(
                f"base weights of {', '.join(self.names[:3])}... changed under a trained core; its factors are still "
                "those of the weights it was trained on",
                stacklevel=2,
            )
            return
        chosen = self._selection if self.rule == "activation" else select(weights, *self.rank, self.rule, self.seed)
        folded = self.factors_of(weights, chosen)
        for name, value in folded.items():
            getattr(self, name).copy_(value)
        self.rows.copy_(chosen.rows)
        self.columns.copy_(chosen.columns)

    def extra_repr(self) -> str:
        (out_features, in_features), (c, r) = self.shape, self.rank
        return f"slices={self.slices}, out={out_features}, in={in_features}, c={c}, r={r}, scale={self.scale:.4g}"


def require_finite(weights: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError, with the name of the slice, where weights (S, out, in) are NaN or infinite."""
    for index, weight in enumerate(weights):
        # NaN spreads through the extremes: one pass without isfinite's mask, 8 ms instead of 41 for 3072 x 768.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            name = names[index] if names else f"slice {index}"
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, expected finite ones")
