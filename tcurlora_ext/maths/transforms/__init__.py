"""Transforms along the slices of a stack, one a file. A new one is a file here and a line in :data:`TRANSFORMS`.

What the C++ and Triton kernels compute with is spelled out there too (csrc/middle.h, kernels/middle.py); a transform
that they do not know is computed in PyTorch's operations.
"""

from __future__ import annotations

from .base import CallShape, SliceTransform
from .dct import DCT
from .dft import DFT
from .identity import Identity

__all__ = ["TRANSFORMS", "CallShape", "SliceTransform", "transform_named", "with_middle_product"]

TRANSFORMS: dict[str, SliceTransform] = {transform.name: transform for transform in (DFT(), DCT(), Identity())}


def transform_named(name: str) -> SliceTransform:
    """The transform of a name. ValueError for an unknown one."""
    if name not in TRANSFORMS:
        raise ValueError(f"transform {name!r} is unknown, expected one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def with_middle_product(name: str) -> SliceTransform:
    """As :func:`transform_named`, for a folding that the operator computes with: all slices share the core."""
    known = [repr(one.name) for one in TRANSFORMS.values() if one.shares_core]
    if name not in TRANSFORMS or not TRANSFORMS[name].shares_core:
        raise ValueError(f"transform {name!r} has no middle product, expected {' or '.join(known)}")
    return TRANSFORMS[name]
