"""The slices of a stack that belong to a layer, and what the layer computes with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tcurlora_ext.maths import folding, lora
from tcurlora_ext.maths.contract import Factors

if TYPE_CHECKING:
    from .stack import TCURStack


class LayerSlices(NamedTuple):
    """The consecutive slices of a stack that are, stacked by rows, a layer's weight.

    Attributes:
        stack: The :class:`tcurlora_ext.TCURStack`.
        first_slice: Index in the stack of the layer's first slice.
        num_slices: How many slices the layer's weight has.
    """

    stack: TCURStack
    first_slice: int
    num_slices: int

    @property
    def indices(self) -> range:
        """The indices of the slices in the stack."""
        return range(self.first_slice, self.first_slice + self.num_slices)

    def adapt(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """:meth:`tcurlora_ext.TCURStack.adapt` for these slices."""
        return self.stack.adapt(x, weight, bias, self.first_slice, self.num_slices, training)

    @property
    def rides(self) -> bool:
        """Whether one changed input has the whole delta: the stack rides, and the layer is one slice."""
        return self.stack.rides and self.num_slices == 1

    def changed_input(self, x: Tensor, training: bool) -> Tensor:
        """:meth:`tcurlora_ext.TCURStack.changed_input` for a layer of one slice."""
        return self.stack.changed_input(x, self.first_slice, training)

    def delta(self, x: Tensor, training: bool) -> Tensor:
        """:meth:`tcurlora_ext.TCURStack.delta` for these slices."""
        return self.stack.delta(x, self.first_slice, self.num_slices, training)

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense dW of these slices, scale included: (num_slices*out, in) in ``dtype`` (None: the core's)."""
        return self.stack.delta_weights(self.indices, dtype).flatten(0, 1)

    def lora_rank(self) -> int:
        """The rank of :meth:`lora_factors`."""
        return lora.lora_rank(self._calls_in_float64())

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (q, in) and B (num_slices*out, q) with dW = B A, scale included: float64, on the stack's device."""
        return lora.lora_factors(self._calls_in_float64())

    @torch.no_grad()
    def _calls_in_float64(self) -> list[Factors]:
        stack, options = self.stack, self.stack.options
        core = stack.core.detach().double()
        if options.core_domain == "slice":
            core = folding.fold_core(core, options.transform)
        col, row = stack.col.detach().double(), stack.row.detach().double()
        return options.along.calls(col, core, row, stack.slices, self.first_slice, self.num_slices, stack.scale)


def stacked_in_order(weights: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The weights (S, out, in) of a stack from the weights (num_slices, out, in) of its layers.

    Args:
        weights: The index of its first slice and the weight of every layer, in any order.
    """
    return torch.cat([weight for _, weight in sorted(weights, key=lambda layer: layer[0])])
