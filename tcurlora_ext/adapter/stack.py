"""A stack: same-shaped frozen weights as slices of one tensor, and the one core they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.maths import packing
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.selection import Selection, select
from tcurlora_ext.operator.functional import tcur_delta, tcur_linear

from .config import CORE_DOMAINS, TRAINABLE, Rank, fitting_pair, one_of
from .factors import StackFactors, require_finite
from .reloaded import Reloaded


class TCURStack(StackFactors):
    """``W' = W + scale * C * U * R`` for S weights of one shape; what its layers share. :meth:`from_weights` makes one.

    Args:
        weights: W (S, out, in).
        selection: The chosen rows and columns.
        rule: Name of the rule that chose them: other base weights that are loaded are chosen from by it again.
        scale, names: As for :meth:`from_weights`.
        alpha, rank_stabilised, dropout, seed, transform, core_domain, trainable, backend, frequencies: As in
            :class:`TCURConfig`.

    Attributes:
        slices: S, the number of weights.
        core: The parameter (S, c, r), with ``frequencies`` fewer blocks of it, real, at least float32, zero at the
            start, in ``core_domain``.
        col: C folded, (out, c*S) in the weights' dtype: a frozen buffer, or with ``trainable="all"`` a parameter of at
            least float32; see :mod:`tcurlora_ext.maths.packing`.
        row: R folded, (r*S, in), as ``col``.
        rows: Chosen output features, r int64, best first.
        columns: Chosen input features, c int64, best first.
        row_scores, column_scores: Why, a list of numbers.
        scale: One number, what C * U * R is multiplied by.
        names: Module of each slice, in the order of the slices.
        normalised: Whether columns of C and rows of R have unit norm over the stack.
    """

    core: nn.Parameter

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
        shape = (self.blocks, len(selection.columns), len(selection.rows))
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
        """The stack of some weights.

        Args:
            weights: (S, out, in), any floating dtype, on any device but meta.
            rank: r, or (c, r).
            selection: A rule's name, see :mod:`tcurlora_ext.maths.selection`, or rows and columns chosen before.
            scale: A number: raw factors times it; None: unit-norm factors and the default rule.
            inputs: (S, in), root mean squares of the input features, for the rule "activation" and no other.
            names: Module of each slice, for messages and files.
            alpha, rank_stabilised, dropout, seed, transform, core_domain, trainable, backend, frequencies: As in
                :class:`TCURConfig`.

        Raises:
            ValueError: Weights of another shape, empty, not floating, on meta or not finite; a rank larger than a side;
                an unknown rule, ``transform``, ``core_domain`` or ``trainable``; ``inputs`` missing, of another shape
                or not asked for; factors that are all zero, with ``scale=None``.
        """
        if weights.dim() != 3 or 0 in weights.shape:
            raise ValueError(f"weights have shape {tuple(weights.shape)}, expected (slices, out, in), none of them 0")
        if not weights.is_floating_point():
            raise ValueError(f"weights are {weights.dtype}, expected a floating dtype")
        if weights.is_meta:
            raise ValueError("weights are on the meta device: rows and columns are chosen from real values")
        one_of("transform", transform, packing.TRANSFORMS)
        one_of("core_domain", core_domain, CORE_DOMAINS)
        one_of("trainable", trainable, TRAINABLE)
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

    @property
    def rank(self) -> tuple[int, int]:
        """(c, r)."""
        return self.core.shape[1], self.core.shape[2]

    # -- the core -----------------------------------------------------------------------------------------------------

    def core_slices(self) -> Tensor:
        """The paper's U (S, c, r), whatever the domain; differentiable."""
        return self.core if self.core_domain == "slice" else packing.unfold_core(self.core, self.transform, self.slices)

    def core_fourier(self) -> Tensor:
        """The orthonormal slice transform of U (S, c, r): what the operator takes; differentiable."""
        return self.core if self.core_domain == "fourier" else packing.fold_core(self.core, self.transform)

    @torch.no_grad()
    def set_core_slices(self, core: Tensor) -> None:
        """Set U, of which a core of low frequencies takes these alone.

        Args:
            core: (S, c, r), any floating dtype and device.

        Raises:
            ValueError: It has another shape or values that are not finite.
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
        """``x W^T + bias`` plus the adapter, for some slices.

        Args:
            x: (..., in).
            weight: (num_slices*out, in), the slices' weights stacked by rows, in the dtype of x.
            bias: (num_slices*out,) or None.
            first_slice: Index of the first of these slices in the stack.
            num_slices: How many there are.
            training: Whether the adapter's x goes through dropout; the base's does not.

        Returns:
            (..., num_slices*out) in the dtype of x.
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
        """The adapter's part of :meth:`adapt` alone, for what cannot be fused with the base product: a dropped x, a
        quantised base, some rows of a batch.

        Args:
            x: (..., in).
            first_slice: Index of the first of these slices in the stack.
            num_slices: How many there are.
            training: Whether x goes through dropout.

        Returns:
            (..., num_slices*out) in the dtype of x.
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
        """``scale * C * U * R``, dense and differentiable: for inspection, merging and tests, not the path of training.

        Args:
            layers: Which slices; None: all S.
            dtype: Of the computation and of the result; None: the core's.

        Returns:
            (S, out, in), or as many slices as asked for.
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

    @torch.no_grad()
    def follow_base(self, weights: Tensor) -> None:
        """Choose and take rows and columns anew where the base weights changed and U is still zero.

        Chosen by "activation" they stay, and are taken anew: the calibration inputs are gone. A core that is not zero
        belongs to the weights it was trained on: the factors stay, with a warning.

        Args:
            weights: The new ones, (S, out, in).

        Warns:
            UserWarning: The core is not zero.
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
