"""Which backends exist here, and on which kinds of device they work."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType

NAMES = ("eager", "native", "triton")


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("tcurlora_ext._C"), ""
    except ModuleNotFoundError:
        return None, "the C++ extension was not built when this package was installed"
    except ImportError as error:  # built against another torch: a symbol is missing
        return None, f"the C++ extension does not load, install this package again ({error})"


def extension() -> ModuleType | None:
    """``tcurlora_ext._C``, which registers the operators when imported; None where it is not built or does not load."""
    return _load()[0]


def missing(name: str, device_type: str) -> str:
    """Why a backend does not work on a kind of device ("cpu", "cuda", ...); "" where it does."""
    if name == "native":
        return _native_missing(device_type)
    if name == "triton":
        return _triton_missing(device_type)
    return ""


def _native_missing(device_type: str) -> str:
    built, reason = _load()
    if built is None:
        return reason
    kernels = built.build()["kernels"]
    return "" if device_type in kernels else f"the C++ extension was built with kernels for {' and '.join(kernels)}"


def _triton_missing(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton reads the variable when its functions are made; it then runs them in Python, on CPU tensors alone.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "" if device_type == "cpu" else "TRITON_INTERPRET=1 leaves the kernels to an interpreter on the CPU"
    return "" if device_type == "cuda" else "the Triton kernels are for CUDA devices"
