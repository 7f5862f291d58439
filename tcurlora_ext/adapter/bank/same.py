"""That the model of a bank is still the one for which its adapters were made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.model.structure import adapted_layers, require_adapted
from tcurlora_ext.adapter.stack import TCURStack


class SameModel:
    """What a model was when its bank was made, for a comparison before each batch, which takes microseconds.

    Args:
        model: The adapted model.
        stacks: Its stacks by name.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, TCURStack]) -> None:
        self._layers = list(adapted_layers(model))
        self._container = require_adapted(model).container
        self._subspace = self._container.subspace
        self._stacks = stacks
        self._devices = {name: stack.core.device for name, stack in stacks.items()}
        self._chosen = {name: [index.clone() for index in _indices(stack)] for name, stack in stacks.items()}
        self._orthonormal = {name: stack.options.orthonormal for name, stack in stacks.items()}
        self._seen = {name: _state(stack) for name, stack in stacks.items()}

    def require(self) -> None:
        """Raise ValueError where a layer is merged, or a stack is on another device or has other rows or columns."""
        for name, layer in self._layers:
            if layer.merged:
                raise ValueError(f"{name} is merged: call unmerge(model) before a batch of the bank's adapters")
        now = self._container.subspace
        if now is not self._subspace and (now is None or self._subspace is None or now.digest != self._subspace.digest):
            raise ValueError(
                "the model is over another subspace than when the bank was made: an adapter over it was loaded, to "
                "which those of the bank do not belong"
            )
        for name, stack in self._stacks.items():
            if stack.core.device != self._devices[name]:
                raise ValueError(
                    f"stack {name} is on {stack.core.device}, its adapters are on {self._devices[name]}: make the bank "
                    "after moving the model"
                )
            state = _state(stack)
            if state == self._seen[name]:
                continue
            if not all(torch.equal(a, b) for a, b in zip(_indices(stack), self._chosen[name], strict=True)):
                raise ValueError(
                    f"stack {name} has other rows or columns than when the bank was made: other base weights were "
                    "loaded, to which its adapters do not belong"
                )
            if stack.options.orthonormal != self._orthonormal[name]:
                raise ValueError(
                    f"stack {name} has orthonormal={stack.options.orthonormal!r}, unlike when the bank was made: an "
                    "adapter of that kind was loaded, and those of the bank do not belong to its factors"
                )
            self._seen[name] = state


def _indices(stack: TCURStack) -> tuple[Tensor, Tensor]:
    buffers = stack._buffers  # a look-up in a module takes a microsecond, and a model may have hundreds of stacks
    rows, columns = buffers["rows"], buffers["columns"]
    assert rows is not None
    assert columns is not None
    return rows, columns


def _state(stack: TCURStack) -> tuple[bool, list[tuple[int, int]]]:
    """Equal as long as nothing was written to the stack's rows and columns, and they become factors as before."""
    return stack.options.orthonormal, [(id(index), index._version) for index in _indices(stack)]
