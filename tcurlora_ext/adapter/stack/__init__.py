"""A stack of same-shaped weights and the core that its layers share."""

from .stack import TCURStack

__all__ = ["TCURStack"]
