"""The layers of a stack: where its factors come from, and where the columns of a riding stack stay."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class StackLayers(weakref.WeakValueDictionary[int, Any]):
    """First slice -> layer. The references are weak: a layer has its stack, and a stack must not keep its layers.

    A copied or unpickled stack starts with an empty dictionary; its layers, copied too, enter themselves again.
    """

    def weights(self, stack: Any) -> list[Tensor] | None:
        """The base weights (num_slices, out, in) of all layers in the order of the slices, without a copy.

        Args:
            stack: The stack whose slices the layers have; a layer may have adapters of several.

        Returns:
            None unless the layers of all slices are here.
        """
        layers = [layer for _, layer in sorted(self.items())]
        if sum(layer.slices_in(stack) for layer in layers) != stack.slices:
            return None
        return [layer.base_slices(stack) for layer in layers]

    def may_ride(self) -> bool:
        """Whether a changed input can have the delta of every layer; no layer of convolutions says so."""
        return all(getattr(layer, "may_ride", True) for layer in self.values())

    def __reduce__(self) -> tuple[type[StackLayers], tuple[()]]:
        return StackLayers, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> StackLayers:
        return StackLayers()


class ReloadedLayers(StackLayers):
    """The layers whose base weights were loaded since their stack last took its factors."""

    changed = False  # whether loading changed any of those weights

    def __reduce__(self) -> tuple[type[StackLayers], tuple[()]]:
        return ReloadedLayers, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReloadedLayers:
        return ReloadedLayers()
