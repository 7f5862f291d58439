"""Transforms along the slices of a stack, one per file. A new one is a file here and an entry in :data:`TRANSFORMS`.

The C++ and Triton kernels have the transforms that they compute with written out as well (csrc/middle.h,
kernels/middle.py). Any other transform is computed in PyTorch operations.
"""

from __future__ import annotations

from .base import CallShape, SliceTransform
from .dct import DCT
from .dft import DFT
from .identity import Identity

__all__ = ["TRANSFORMS", "CallShape", "SliceTransform", "transform_named", "with_middle_product"]

TRANSFORMS: dict[str, SliceTransform] = {transform.name: transform for transform in (DFT(), DCT(), Identity())}


def transform_named(name: str) -> SliceTransform:
    """The transform of this name. Raises ValueError for an unknown one.

    Args:
        name: As options, files and the operator spell it.
    """
    if name not in TRANSFORMS:
        raise ValueError(f"transform {name!r} is unknown, expected one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def with_middle_product(name: str) -> SliceTransform:
    """As :func:`transform_named`, but also raises ValueError for a transform under which slices share no core.

    Args:
        name: As options, files and the operator spell it.
    """
    known = [repr(one.name) for one in TRANSFORMS.values() if one.shares_core]
    if name not in TRANSFORMS or not TRANSFORMS[name].shares_core:
        raise ValueError(f"transform {name!r} has no middle product, expected {' or '.join(known)}")
    return TRANSFORMS[name]
