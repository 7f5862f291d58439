"""Which layers of a stack have had their base weights loaded, for the stack to follow."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Reloaded(weakref.WeakValueDictionary[int, Any]):
    """Layers (by first slice) whose base weights were loaded since their stack was; forgotten by copies and pickles."""

    changed = False  # whether any of those weights became another one

    def weights(self, slices: int) -> Tensor | None:
        """The base weights (S, out, in) of all layers in order, None unless all slices were loaded."""
        layers = [layer for _, layer in sorted(self.items())]
        complete = sum(layer.num_slices for layer in layers) == slices
        return torch.cat([layer.weight_slices() for layer in layers]) if complete else None

    def __reduce__(self) -> tuple[type[Reloaded], tuple[()]]:
        return Reloaded, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reloaded:
        return Reloaded()
