"""The layers whose base weights were loaded, so that their stack can take its factors from the new weights."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from .slices import stacked_in_order


class Reloaded(weakref.WeakValueDictionary[int, Any]):
    """First slice -> layer, for the layers whose base weights were loaded since their stack last took its factors.

    The references are weak. A copied or unpickled stack starts with an empty dictionary.
    """

    changed = False  # whether loading changed any of those weights

    def weights(self, slices: int) -> Tensor | None:
        """The base weights (S, out, in) in the order of the slices; None unless those of all slices were loaded."""
        if sum(layer.num_slices for layer in self.values()) != slices:
            return None
        return stacked_in_order((first, layer.weight_slices()) for first, layer in self.items())

    def __reduce__(self) -> tuple[type[Reloaded], tuple[()]]:
        return Reloaded, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reloaded:
        return Reloaded()
