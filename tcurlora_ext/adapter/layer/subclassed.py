"""Adapted layers for subclasses of ``nn.Linear`` that compute what it computes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .linear import TCURLinear

# Subclasses that write out the product of nn.Linear instead of inheriting it.
_SAME_PRODUCT = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


class TCURSubclassed(TCURLinear):
    """A :class:`TCURLinear` in the place of a subclass of ``nn.Linear``, which it goes on being an instance of.

    Attributes:
        kind: The class of the layer without an adapter; :func:`subclassed_type` makes a subclass of both.
    """

    kind: ClassVar[type[nn.Linear]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.kind,), self.__dict__


_types: dict[type[nn.Linear], type[TCURSubclassed]] = {}


def computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a class is ``nn.Linear``, or a subclass of it that computes the same from the same weight and bias.

    The output projection of nn.MultiheadAttention is one: where it is adapted, its parent is let call it.
    """
    if not issubclass(kind, nn.Linear):
        return False
    return kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__qualname__}" in _SAME_PRODUCT


def subclassed_type(kind: type[nn.Linear]) -> type[TCURLinear]:
    """The class of adapted layers of ``nn.Linear`` or a subclass of it.

    Args:
        kind: The class of the layer without an adapter.
    """
    if kind is nn.Linear:
        return TCURLinear
    if kind not in _types:
        own = {"kind": kind, "__doc__": TCURSubclassed.__doc__}
        _types[kind] = type(f"TCUR{kind.__name__}", (TCURSubclassed, kind), own)
    return _types[kind]


def _empty(kind: type[nn.Linear]) -> TCURLinear:
    """An instance without state, for copies and pickles: pickle cannot find a class that was made at run time."""
    made = subclassed_type(kind)
    return made.__new__(made)
