"""The flat arguments of ``torch.ops.tcurlora.*``: their schema, and how they become those of a backend.

The list itself is :class:`tcurlora_ext.maths.contract.Factors`; in C++ it is csrc/operator.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients

from .backends import Backend

SHARED = Factors._fields[:-1]  # what stands before ``needs``; the transform is an option, behind it
FACTORS = ", ".join(f"{get_type_hints(Factors)[name].__name__} {name}" for name in SHARED)
OPTIONS = 'str transform="dft", str backend="auto"'
GRADIENTS = "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dcol, Tensor dcore, Tensor drow)"


def forward_schema(name: str, options: str = OPTIONS, result: str = "(Tensor y, Tensor h)") -> str:
    """The schema of an operator with the arguments of ``forward``."""
    return f"{name}(Tensor x, Tensor weight, Tensor? bias, {FACTORS}, {options}) -> {result}"


def backward_schema(name: str, options: str = OPTIONS) -> str:
    """The schema of an operator with the arguments of ``backward``."""
    return f"{name}(Tensor g, Tensor? x, Tensor? h, Tensor weight, {FACTORS}, bool[6] needs, {options}) -> {GRADIENTS}"


def forward_arguments(*rest: Any) -> tuple[Factors, str]:
    """What follows x, weight and bias, trailing defaults left out: the factors, and the backend's name."""
    factors, backend = rest[: len(Factors._fields)], rest[len(Factors._fields) :]
    return Factors(*factors), *(backend or ("auto",))


def backward_arguments(*rest: Any) -> tuple[Factors, list[bool], str]:
    """What follows g, x, h and weight: as of forward, with the gradients that are asked for behind the scale."""
    at = len(SHARED)
    factors, backend = forward_arguments(*rest[:at], *rest[at + 1 :])
    return factors, rest[at], backend


def forward_of(backend: Backend) -> Callable[..., tuple[Tensor, Tensor]]:
    """A backend's ``forward`` with the operator's arguments."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return backend.forward(x, weight, bias, forward_arguments(*rest)[0])

    return forward


def backward_of(backend: Backend) -> Callable[..., Gradients]:
    """A backend's ``backward`` with the operator's arguments."""

    def backward(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
        factors, needs, _ = backward_arguments(*rest)
        return backend.backward(g, x, h, weight, factors, needs)

    return backward
