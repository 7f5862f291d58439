"""The implementations of the operator, one a file, and the table by which ``"auto"`` takes one of them."""

from .base import Backend
from .registry import BACKENDS, missing
from .status import BackendStatus, backends

__all__ = ["BACKENDS", "Backend", "BackendStatus", "backends", "missing"]
