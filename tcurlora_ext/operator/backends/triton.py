"""The Triton kernels of :mod:`tcurlora_ext.kernels`, on CUDA devices or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients
from tcurlora_ext.operator.checks import check

from .base import Backend


def missing(device_type: str) -> str:
    """Why the kernels do not run on a kind of device; "" where they do."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton reads the variable when its functions are made; it then runs them in Python, on CPU tensors alone.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "" if device_type == "cpu" else "TRITON_INTERPRET=1 leaves the kernels to an interpreter on the CPU"
    return "" if device_type == "cuda" else "the Triton kernels are for CUDA devices"


def _kernels() -> Any:
    # Imported when first used: it needs the package triton.
    from tcurlora_ext.kernels import operator

    return operator


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """As eager.forward. Raises ValueError where the tensors do not fit together, before any kernel is launched."""
    check(x, weight, bias, factors)
    return _kernels().forward(x, weight, bias, factors)


def backward(*arguments: Any) -> Gradients:
    """As eager.backward."""
    return _kernels().backward(*arguments)


TRITON = Backend(
    name="triton", description=lambda: "Triton kernels", missing=missing, forward=forward, backward=backward
)
