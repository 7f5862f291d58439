"""The implementations of the operator, one per file, and the table by which ``"auto"`` chooses between them."""

from .base import Backend
from .registry import BACKENDS, missing
from .status import BackendStatus, backends

__all__ = ["BACKENDS", "Backend", "BackendStatus", "backends", "missing"]
