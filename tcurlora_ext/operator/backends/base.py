"""The interface of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tcurlora_ext.maths.contract import Gradients


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator.

    Attributes:
        name: The name for the argument ``backend``.
        description: What computes, in a few words, for :func:`tcurlora_ext.backends`.
        missing: Maps a device type ("cpu", "cuda", ...) to the reason why the backend does not work on it, or to "".
        forward: (x, weight, bias, factors) -> y (..., n*out) and h (T, r*S).
        backward: (g, x, h, weight, factors, needs) -> gradients of x, weight, bias, col, core and row; an empty tensor
            for every gradient that ``needs`` does not ask for.
        ride: (x, riding) -> the changed input x' (T, in) and h (T, r), for x (T, in) and a
            :class:`tcurlora_ext.maths.contract.Riding`.
        ride_back: (g, x, h, riding, needs) -> gradients of core and row; g, the gradient of x' (T, in), becomes that of
            x where ``needs``, for x, core and row, asks for it.
        in_python: True: the registered operators call these functions. False: csrc/ implements the backend, and these
            functions call the registered operators.
    """

    name: str
    description: Callable[[], str]
    missing: Callable[[str], str]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    ride: Callable[..., tuple[Tensor, Tensor]]
    ride_back: Callable[..., tuple[Tensor, Tensor]]
    in_python: bool = True
