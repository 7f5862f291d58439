"""Adapter files: their format, and how they are saved and loaded."""

from .format import read_adapter
from .loading import load_adapter
from .saving import save_adapter

__all__ = ["load_adapter", "read_adapter", "save_adapter"]
