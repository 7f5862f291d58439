"""Adapted layers around the forward pass of another kind of linear layer: quantised ones."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .linear import TCURLayer
from .quantised import dequantised, rounds_its_input


class TCURCarried(TCURLayer):
    """A quantised layer with a t-CUR adapter, computed by the layer's own forward pass.

    Where the adapter rides, that forward pass gets a changed input. Otherwise, and where the layer rounds its input to
    int8, the delta is added to its output. C and R are taken from the dequantised weight.

    Attributes:
        kind: The class of the layer without an adapter; :func:`carried_type` makes a subclass of both.
    """

    kind: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter.

        Args:
            x: (..., in) in a dtype that the layer takes.

        Returns:
            (..., out) in the dtype of the layer's own output.
        """
        self._note_call()
        own = self.layer_slices
        if own.rides and not rounds_its_input(self):
            result: Tensor = self.kind.forward(self, own.changed_input(x, self.training))
            return result
        result = self.kind.forward(self, x)
        return result + own.delta(x, self.training).to(result.dtype)

    def weight_slices(self) -> Tensor:
        """The dequantised weight as slices (num_slices, out, in), a new tensor."""
        return dequantised(self).unflatten(0, (self.num_slices, -1))

    def merged_weight(self) -> Tensor:
        """Raises ValueError: a sum with dW would have to be quantised again."""
        raise ValueError(
            f"it is quantised, a {self.kind.__name__}, and cannot be merged; merge on the base before it is quantised, "
            "or through PEFT, which quantises again"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.kind,), self.__dict__

    def _save_to_state_dict(self, *given: Any) -> None:
        super(TCURLayer, self)._save_to_state_dict(*given)

    def _load_from_state_dict(self, *given: Any) -> None:
        super(TCURLayer, self)._load_from_state_dict(*given)


_types: dict[type[nn.Module], type[TCURCarried]] = {}


def carried_type(kind: type[nn.Module]) -> type[TCURCarried]:
    """The class of adapted layers of a kind of quantised layer.

    Args:
        kind: The class of the layer without an adapter.
    """
    if kind not in _types:
        _types[kind] = type(f"TCUR{kind.__name__}", (TCURCarried, kind), {"kind": kind, "__doc__": TCURCarried.__doc__})
    return _types[kind]


def _empty(kind: type[nn.Module]) -> TCURCarried:
    """An instance without state, for copies and pickles: pickle cannot find a class that was made at run time."""
    made = carried_type(kind)
    return made.__new__(made)
