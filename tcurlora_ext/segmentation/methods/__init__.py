"""Ways to adapt a pretrained network, by name.

A method is one file of this folder with a :class:`Method` named ``METHOD``: what trains, its options, how it is saved
and loaded, and its colour in figures. Nothing else has to be changed to add one.
"""

from .base import METHOD_KEY, Method, MethodOptions, Prepare, Task, Unset, base_name, beside, folder_name, train_only
from .registry import METHODS, STANDARD, get_methods, learning_rate

__all__ = [
    "METHODS",
    "METHOD_KEY",
    "STANDARD",
    "Method",
    "MethodOptions",
    "Prepare",
    "Task",
    "Unset",
    "base_name",
    "beside",
    "folder_name",
    "get_methods",
    "learning_rate",
    "train_only",
]
