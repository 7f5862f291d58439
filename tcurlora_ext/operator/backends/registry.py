"""The backends by name. A new backend is a file beside this one and an entry here."""

from __future__ import annotations

from .base import Backend
from .eager import EAGER
from .native import NATIVE
from .triton import TRITON

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (EAGER, NATIVE, TRITON)}


def missing(name: str, device_type: str) -> str:
    """Why a backend does not work on a device type ("cpu", "cuda", ...); "" where it works."""
    return BACKENDS[name].missing(device_type)
