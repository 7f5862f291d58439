"""A stack: same-shaped frozen weights as the slices of one tensor, and the core that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.options import GIVEN, LEARNED, LEARNED_ROWS, WEIGHTS, Rank, StackOptions, fitting_pair
from tcurlora_ext.maths import folding
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.selection import Selection, select
from tcurlora_ext.operator.convolution import Geometry, convolved, kernels_of
from tcurlora_ext.operator.functional import changed_input, tcur_delta, tcur_linear, tcur_riding

from .batches import adapted_by_batch
from .factors import LearnedFactors, require_finite, require_stack
from .state import StackState


class TCURStack(StackState):
    """``W' = W + scale * C * U * R`` for S weights of one shape: the core and the factors that their layers share.

    :meth:`from_weights` is the usual way to build one.

    Args:
        weights: W (S, out, in).
        selection: The chosen rows and columns; none where the factor that they would be is learned.
        options: How it is built, trained and computed; ``options.selection`` is the rule that chose.
        names: The module of each slice, for messages and files.
        learned: C and R where ``options.factors`` says that they are learned.

    Attributes:
        options: The :class:`tcurlora_ext.adapter.options.StackOptions`.
        slices: S, the number of weights.
        core: The parameter (S, c, r), or (fewer, c, r) with ``frequencies``. It is real, at least float32, zero at
            the start, and in the options' ``core_domain``.
        row: R folded, (r*S, in), a buffer or parameter.
        rides: Whether C is columns of the layers' own weights, so that their adapters ride on the base product.
        rows: The chosen output features, (r,) int64, best first; (0,) where R is learned.
        columns: The chosen input features, (c,) int64, best first; (0,) where C is learned.
        row_scores, column_scores: The scores by which the rule chose them, lists of floats.
        scale: The factor of C * U * R.
        names: The module of each slice, in the order of the slices.
    """

    @classmethod
    def from_weights(
        cls,
        weights: Tensor,
        rank: Rank = 8,
        selection: str | Selection = "norm",
        scale: float | None = 1.0,
        *,
        inputs: Tensor | None = None,
        names: Sequence[str] = (),
        **options: Any,
    ) -> TCURStack:
        """Build the stack of some weights.

        Args:
            weights: (S, out, in), any floating dtype, on any device but meta.
            rank: r, or (c, r).
            selection: A rule's name, see :mod:`tcurlora_ext.maths.selection`; or rows and columns chosen beforehand,
                which the stack keeps also when other base weights are loaded.
            scale: A number: raw factors, and this is the scale; None: unit-norm factors and the default rule.
            inputs: (S, in), root mean squares of the input features; required by the rule "activation", refused by
                other rules.
            names: The module of each slice, for messages and files.
            **options: ``alpha``, ``rank_stabilised``, ``dropout``, ``seed``, ``transform``, ``core_domain``,
                ``trainable``, ``backend``, ``frequencies`` and ``orthonormal``, as in :class:`TCURConfig`.

        Raises:
            TypeError: An option has an unknown name.
            ValueError: The weights have another shape, are empty, not floating, on meta or not finite; the rank is
                larger than a side; :class:`TCURConfig` refuses an option; ``inputs`` are missing, of another shape, or
                given to a rule that takes none; or a factor is all zero with ``scale=None``.
        """
        rule, chosen = (selection, None) if isinstance(selection, str) else (GIVEN, selection)
        made = StackOptions(rank, selection=rule, scale=scale, **options)
        return cls.with_options(weights, made, chosen, inputs=inputs, names=names)

    @classmethod
    def with_options(
        cls,
        weights: Tensor,
        options: StackOptions,
        selection: Selection | None = None,
        *,
        inputs: Tensor | None = None,
        names: Sequence[str] = (),
        learned: LearnedFactors | None = None,
    ) -> TCURStack:
        """As :meth:`from_weights`, with the options as one object.

        Args:
            weights, inputs, names: As there.
            options: How the stack is made.
            selection: Rows and columns chosen before; None: the options' rule chooses.
            learned: Factors from a :class:`tcurlora_ext.Subspace`, where the options say that they are learned.
        """
        require_stack(weights)
        c, r = fitting_pair(options.rank, (weights.shape[1], weights.shape[2]))
        require_finite(weights, names)
        if (learned is None) != (options.factors == WEIGHTS):
            raise ValueError(
                f"factors is {options.factors!r}, expected "
                + ("'learned' or 'learned_rows' with a subspace" if learned else "a subspace: see learn_factors")
            )
        if options.factors == LEARNED:
            selection = Selection.none(weights.device)
        elif selection is None:
            selection = select(weights, c, r, options.selection, options.seed, inputs)
        if options.factors == LEARNED_ROWS:
            selection = selection.without_rows()
        return cls(weights.detach(), selection, options, names, learned)

    @property
    def rank(self) -> tuple[int, int]:
        """(c, r)."""
        return self.core.shape[1], self.core.shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one slice."""
        return self.out_features, self.row.shape[1]

    # -- the core -----------------------------------------------------------------------------------------------------

    def core_slices(self) -> Tensor:
        """The paper's U (S, c, r), whatever the domain; differentiable."""
        if self.options.core_domain == "slice":
            return self.core
        return folding.unfold_core(self.core, self.options.transform, self.slices)

    def core_fourier(self) -> Tensor:
        """The orthonormal slice transform of U (S, c, r), as the operator takes it; differentiable."""
        if self.options.core_domain == "fourier":
            return self.core
        return folding.fold_core(self.core, self.options.transform)

    @torch.no_grad()
    def set_core_slices(self, core: Tensor) -> None:
        """Set U. A core with ``frequencies`` keeps only the low frequencies of it.

        Args:
            core: (S, c, r), any floating dtype and device.

        Raises:
            ValueError: ``core`` has another shape or values that are not finite.
        """
        expected = (self.slices, *self.rank)
        if core.shape != expected:
            raise ValueError(f"core has shape {tuple(core.shape)}, expected {expected}")
        if not bool(torch.isfinite(core).all()):
            raise ValueError("core has NaN or infinite values, expected finite ones")
        core = core.to(self.core)
        if self.options.core_domain == "fourier":
            core = folding.fold_core(core, self.options.transform, self.blocks)
        self.core.copy_(core)

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
        """``x W^T + bias`` plus the delta, for some slices.

        Args:
            x: (..., in).
            weight: (num_slices*out, in), the slices' weights stacked by rows, in the dtype of x.
            bias: (num_slices*out,) or None.
            first_slice: Index of the first of these slices in the stack.
            num_slices: How many slices there are.
            training: Whether dropout applies to the adapter's input; it never applies to the base's.

        Returns:
            (..., num_slices*out) in the dtype of x.
        """
        if self.rides and weight.requires_grad:
            self.hold_columns()
        if self.banked:
            y = adapted_by_batch(self, x, weight, bias, first_slice, num_slices, training)
            if y is not None:
                return y
        if self.rides:
            return self._riding(x, weight, bias, first_slice, num_slices, training)
        if training and self.options.dropout > 0:
            return nn.functional.linear(x, weight, bias) + self.delta(x, first_slice, num_slices, training)
        calls = self._calls(first_slice, num_slices, weight.dtype)
        if len(calls) == 1:
            return self._linear(x, weight, bias, calls[0])
        parts = layer_parts(weight, bias, len(calls))
        return torch.cat([self._linear(x, *part, call) for part, call in zip(parts, calls, strict=True)], -1)

    def _riding(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, first_slice: int, num_slices: int, training: bool
    ) -> Tensor:
        """:meth:`adapt` in the riding form: one changed input, and one base product, for each slice."""
        seen = nn.functional.dropout(x, self.options.dropout) if training and self.options.dropout > 0 else None
        parts = enumerate(layer_parts(weight, bias, num_slices), first_slice)
        results = [self._riding_slice(x, seen, *part, at) for at, part in parts]
        return results[0] if num_slices == 1 else torch.cat(results, -1)

    def _riding_slice(self, x: Tensor, seen: Tensor | None, weight: Tensor, bias: Tensor | None, at: int) -> Tensor:
        adapter = self.riding(at, weight.dtype)
        if seen is None:
            return tcur_riding(x, weight, bias, adapter, self.options.backend)
        return nn.functional.linear(changed_input(x, seen, adapter), weight, bias)

    def changed_input(self, x: Tensor, slice_index: int, training: bool = False) -> Tensor:
        """The input x' with which the base alone computes what :meth:`adapt` computes, for a stack that ``rides``.

        It is for a base that is called as a module, such as a quantised one.

        Args:
            x: (..., in).
            slice_index: The slice.
            training: Whether dropout applies to the adapter's input.

        Returns:
            (..., in) in the dtype of x, or in autocast's dtype where that is enabled.
        """
        seen = nn.functional.dropout(x, self.options.dropout) if training and self.options.dropout > 0 else None
        return changed_input(x, seen, self.riding(slice_index, x.dtype), self.options.backend)

    def delta(self, x: Tensor, first_slice: int, num_slices: int, training: bool = False) -> Tensor:
        """The delta, the adapter's part of the result of :meth:`adapt`, alone.

        It is for what cannot be fused with the base product: dropout, a quantised base, some rows of a batch.

        Args:
            x: (..., in).
            first_slice: Index of the first of these slices in the stack.
            num_slices: How many slices there are.
            training: Whether dropout applies to x.

        Returns:
            (..., num_slices*out) in the dtype of x.
        """
        if training and self.options.dropout > 0:
            x = nn.functional.dropout(x, self.options.dropout)
        calls = self._calls(first_slice, num_slices, x.dtype)
        deltas = [tcur_delta(x, *call) for call in calls]
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, -1)

    change = delta  # its name before 0.2

    def convolve(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Sequence[int],
        geometry: Geometry,
        slice_index: int,
        training: bool = False,
    ) -> Tensor:
        """The convolution of x by a layer whose weight, as a matrix, is one slice, plus the delta.

        Args:
            x: (N, in, ...).
            weight: The layer's weight as it stores it, in the dtype of x; None: the result is the delta alone.
            bias: (out,) or None.
            shape: The shape of the layer's weight.
            geometry: Stride, padding and dilation.
            slice_index: The slice.
            training: Whether dropout applies to the adapter's input; it never applies to the base's.

        Returns:
            (N, out, ...) in the dtype of x.
        """
        seen = nn.functional.dropout(x, self.options.dropout) if training and self.options.dropout > 0 else None
        call = self._calls(slice_index, 1, x.dtype if weight is None else weight.dtype)[0]
        return self._convolved(x, seen, weight, bias, shape, call, geometry)

    def _convolved(
        self,
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Sequence[int],
        call: Factors,
        geometry: Geometry,
    ) -> Tensor:
        return convolved(x, seen, weight, bias, kernels_of(call, shape, geometry.transposed), geometry)

    def _calls(self, first_slice: int, num_slices: int, dtype: torch.dtype) -> list[Factors]:
        """The operator's arguments for these slices: one call, or one per slice where the transform needs it."""
        core, col, row = self.core_fourier(), self.col, self.row
        if col.dtype != dtype:
            col, row = col.to(dtype), row.to(dtype)
        return self.options.along.calls(col, core, row, self.slices, first_slice, num_slices, self.scale)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Factors) -> Tensor:
        """One call of the operator."""
        backend = self.options.backend
        if backend == "auto" and not self.options.along.has_kernels:
            backend = "eager"
        return tcur_linear(x, weight, bias, *call[:6], backend, call.transform)

    def delta_weights(self, layers: range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """``scale * C * U * R``, dense and differentiable; for inspection, merging and tests, not used in training.

        Args:
            layers: Which slices; None: all S.
            dtype: The dtype of the computation and of the result; None: the core's.

        Returns:
            (S, out, in), or as many slices as asked for.
        """
        dtype = dtype or self.core.dtype
        along, right = self.options.along, self.R.to(dtype)
        left = along.product(self.C.to(dtype), self.core_slices().to(dtype))
        return self.scale * (along.product(left, right) if layers is None else along.product_at(left, right, layers))

    def extra_repr(self) -> str:
        (out_features, in_features), (c, r) = self.shape, self.rank
        return f"slices={self.slices}, out={out_features}, in={in_features}, c={c}, r={r}, scale={self.scale:.4g}"


def layer_parts(weight: Tensor, bias: Tensor | None, number: int) -> list[tuple[Tensor, Tensor | None]]:
    """The weight and bias of every slice of a layer: several where it is a fused projection.

    Args:
        weight: (number*out, in).
        bias: (number*out,) or None.
        number: How many slices there are.
    """
    if number == 1:
        return [(weight, bias)]
    biases = [None] * number if bias is None else bias.chunk(number)
    return list(zip(weight.chunk(number), biases, strict=True))


# Options can be read from the stack too, as before 0.2. It has a rank, a selection and a scale of its own.
for _name in {option.name for option in fields(StackOptions)} - {"rank", "selection", "scale"}:
    setattr(TCURStack, _name, property(attrgetter(f"options.{_name}")))
