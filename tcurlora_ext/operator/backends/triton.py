"""The Triton kernels of :mod:`tcurlora_ext.kernels`, on CUDA devices or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients
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


TRITON = Backend(
    name="triton",
    description=lambda: "Triton kernels",
    missing=missing,
    forward=forward,
    backward=backward,
    ride=eager.ride,
    ride_back=eager.ride_back,
)
