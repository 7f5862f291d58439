"""The flat arguments of ``torch.ops.tcurlora.*``: their schema, and their conversion to the arguments of a backend.

:class:`tcurlora_ext.maths.contract.Factors` lists the adapter's arguments; csrc/operator.h is the same list in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients

from .backends import Backend

SHARED = Factors._fields[:-1]  # the arguments before ``needs``; the transform is an option and follows it
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
    """Parse the arguments after x, weight and bias, of which trailing defaults may be missing: factors and backend."""
    factors, backend = rest[: len(Factors._fields)], rest[len(Factors._fields) :]
    return Factors(*factors), *(backend or ("auto",))


def backward_arguments(*rest: Any) -> tuple[Factors, list[bool], str]:
    """Parse the arguments after g, x, h and weight: those of forward, with ``needs`` after the scale."""
    at = len(SHARED)
    factors, backend = forward_arguments(*rest[:at], *rest[at + 1 :])
    return factors, rest[at], backend


def forward_of(backend: Backend) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function with the operator's flat arguments that calls a backend's ``forward``."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return backend.forward(x, weight, bias, forward_arguments(*rest)[0])

    return forward


def backward_of(backend: Backend) -> Callable[..., Gradients]:
    """A function with the operator's flat arguments that calls a backend's ``backward``."""

    def backward(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
        factors, needs, _ = backward_arguments(*rest)
        return backend.backward(g, x, h, weight, factors, needs)

    return backward
