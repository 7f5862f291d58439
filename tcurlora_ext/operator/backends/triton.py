"""The Triton kernels of :mod:`tcurlora_ext.kernels`, on CUDA devices or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients, Riding
from tcurlora_ext.operator.checks import check

from . import eager
from .base import Backend


def missing(device_type: str) -> str:
    """Why the kernels do not run on a device type; "" where they do."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # With this variable set when its functions are defined, Triton runs them in Python, and on CPU tensors only.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "" if device_type == "cpu" else "TRITON_INTERPRET=1 runs the kernels in an interpreter on the CPU"
    return "" if device_type == "cuda" else "the Triton kernels are for CUDA devices"


def _kernels() -> Any:
    # Imported on first use, because it needs the package triton.
    from tcurlora_ext.kernels import operator

    return operator


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """See eager.forward. Raises ValueError where the tensors do not fit together, before any kernel is launched."""
    check(x, weight, bias, factors)
    return _kernels().forward(x, weight, bias, factors)


def backward(*arguments: Any) -> Gradients:
    """See eager.backward."""
    return _kernels().backward(*arguments)


def _riding_kernels(adapter: Riding) -> Any:
    """The kernels of the riding form, or eager's functions for c or r that are wider than their tiles."""
    from tcurlora_ext.kernels.riding import operator

    return operator if operator.takes(adapter) else eager


def ride(x: Tensor, adapter: Riding) -> tuple[Tensor, Tensor]:
    """See eager.ride."""
    return _riding_kernels(adapter).ride(x, adapter)


def ride_back(
    g: Tensor, x: Tensor | None, h: Tensor | None, adapter: Riding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """See eager.ride_back."""
    return _riding_kernels(adapter).ride_back(g, x, h, adapter, needs)


TRITON = Backend(
    name="triton",
    description=lambda: "Triton kernels",
    missing=missing,
    forward=forward,
    backward=backward,
    ride=ride,
    ride_back=ride_back,
)
