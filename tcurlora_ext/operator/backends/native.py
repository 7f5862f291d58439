"""The C++ extension: C++ kernels on the CPU, CUDA kernels where it was built with them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients, Riding

from .base import Backend


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and the reason why it cannot be loaded."""
    try:
        return importlib.import_module("tcurlora_ext._C"), ""
    except ModuleNotFoundError:
        return None, "the C++ extension was not built when this package was installed"
    except ImportError as error:  # built against another torch: a symbol is missing
        return None, f"the C++ extension does not load, install this package again ({error})"


def extension() -> ModuleType | None:
    """``tcurlora_ext._C``, which registers the operators when imported; None where it is not built or does not load."""
    return _load()[0]


def missing(device_type: str) -> str:
    """Why the extension has no kernels for a device type; "" where it has."""
    built, reason = _load()
    if built is None:
        return reason
    kernels = built.build()["kernels"]
    return "" if device_type in kernels else f"the C++ extension was built with kernels for {' and '.join(kernels)}"


def _description() -> str:
    built = extension()
    return "C++ kernels" if built is None else f"C++ kernels built with torch {built.build()['torch']}"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """See eager.forward. Raises RuntimeError where the extension has no kernels for the device."""
    return torch.ops.tcurlora.forward(x, weight, bias, *factors, NATIVE.name)


def backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, factors: Factors, needs: Sequence[bool]
) -> Gradients:
    """See eager.backward. Raises RuntimeError where the extension has no kernels for the device."""
    *shared, transform = factors
    return torch.ops.tcurlora.backward(g, x, h, weight, *shared, needs, transform, NATIVE.name)


def ride(x: Tensor, adapter: Riding) -> tuple[Tensor, Tensor]:
    """See eager.ride. Raises RuntimeError where the extension has no kernels for the device."""
    return torch.ops.tcurlora.ride_forward(x, *adapter, NATIVE.name)


def ride_back(
    g: Tensor, x: Tensor | None, h: Tensor | None, adapter: Riding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """See eager.ride_back. Raises RuntimeError where the extension has no kernels for the device."""
    dx, dcore, drow = torch.ops.tcurlora.ride_backward(g, x, h, *adapter, needs, NATIVE.name)
    if needs[0]:
        g.copy_(dx)
    return dcore, drow


NATIVE = Backend(
    name="native",
    description=_description,
    missing=missing,
    forward=forward,
    backward=backward,
    ride=ride,
    ride_back=ride_back,
    in_python=False,
)
