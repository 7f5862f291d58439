"""Which layers of a stack have had their base weights loaded, for the stack to follow."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from .slices import stacked_in_order


class Reloaded(weakref.WeakValueDictionary[int, Any]):
    """First slice -> layer, for the layers whose base weights were loaded after their stack's.

    References are weak, and a copied or unpickled stack starts with none.
    """

    changed = False  # whether any of those weights became another one

    def weights(self, slices: int) -> Tensor | None:
        """The base weights (S, out, in) of all layers in order, None unless all slices were loaded."""
        if sum(layer.num_slices for layer in self.values()) != slices:
            return None
        return stacked_in_order((first, layer.weight_slices()) for first, layer in self.items())

    def __reduce__(self) -> tuple[type[Reloaded], tuple[()]]:
        return Reloaded, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reloaded:
        return Reloaded()
