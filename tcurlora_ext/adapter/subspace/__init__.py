"""Learned factors of a model's stacks: a subspace, coded in few bits, and its file."""

from .subspace import StackDirections, Subspace, opened

__all__ = ["StackDirections", "Subspace", "opened"]
