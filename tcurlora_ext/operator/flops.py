"""What PyTorch's FLOP counter (``torch.utils.flop_counter``) counts for ``torch.ops.tcurlora``: base and adapter.

The count is that of :mod:`tcurlora_ext.maths.flops` for every backend: they are compared by the same work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from math import prod
from types import ModuleType
from typing import Any

import torch

from tcurlora_ext.maths.flops import CallFlops

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def forward_flops(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    col: Shape,
    core: Shape,
    row: Shape,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str = "dft",
    backend: str = "auto",
    out_shape: Any = None,
) -> int:
    """Of ``tcurlora::forward``, tensors by their shapes, as the counter passes them."""
    call = _call(x, num_slices, col, core, row, transform)
    return call.base_product() + call.forward()


def backward_flops(
    g: Shape,
    x: Shape | None,
    h: Shape | None,
    weight: Shape,
    col: Shape,
    core: Shape,
    row: Shape,
    first_slice: int,
    num_slices: int,
    scale: float,
    needs: Sequence[bool],
    transform: str = "dft",
    backend: str = "auto",
    out_shape: Any = None,
) -> int:
    """Of ``tcurlora::backward``, tensors by their shapes, as the counter passes them."""
    call = _call(g, num_slices, col, core, row, transform)
    return call.base_backward(needs) + call.backward(needs, keeps_h=h is not None)


def _call(rows: Shape, num_slices: int, col: Shape, core: Shape, row: Shape, transform: str) -> CallFlops:
    slices, c, r = core
    return CallFlops(prod(rows[:-1]), num_slices, slices, col[0], row[1], c, r, transform)


def register() -> None:
    """Have the counter count the operators: now where its module is imported, else as soon as it is.

    Importing it here would import Triton, which takes longer than this package (0.2 s against 0.05).
    """
    if COUNTER in sys.modules:
        _add_formulas(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _add_formulas(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.tcurlora.forward)(forward_flops)
    counter.register_flop_formula(torch.ops.tcurlora.backward)(backward_flops)


class _Finder:
    """Python's way of finding modules, for one module: it gets the formulas when its own code has run."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _add_formulas(module)
