"""What a backend has to say of itself and to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tcurlora_ext.maths.contract import Gradients


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator.

    Attributes:
        name: As ``backend=`` takes it.
        description: What computes, for :func:`tcurlora_ext.backends`.
        missing: Why it does not work on a kind of device ("cpu", "cuda", ...); "" where it does.
        forward: (x, weight, bias, factors) -> y (..., n*out) and h (T, r*S).
        backward: (g, x, h, weight, factors, needs) -> gradients of x, weight, bias, col, core and row, an empty tensor
            where ``needs`` says no.
        in_python: Whether the operators call ``forward`` and ``backward``; else csrc/ computes and these call it.
    """

    name: str
    description: Callable[[], str]
    missing: Callable[[str], str]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    in_python: bool = True
