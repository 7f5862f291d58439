"""A kernel's launch that is planned once and run many times, each time with other tensors of the same layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch

# Arguments that are tensors but belong to the plan: constant tables.
KEPT = ("phases",)
# Numbers that differ between layers of one layout. The kernels are not specialised to them.
NUMBERS = ("first_slice", "slice_index", "scale")


class Prepared:
    """A :class:`Launch` without its tensors, which every run brings.

    Shapes, strides, dtypes and the alignment of the tensors have to be those that the launch was made for: Triton
    compiles a kernel for them. The first run goes through Triton's look-up of the compiled kernel, later ones do not.

    Args:
        launch: The launch for one call.
        operands: The name of the tensor for each argument whose own name differs from it.
    """

    def __init__(self, launch: Launch, **operands: str) -> None:
        self.kernel, self.constants = launch.kernel, launch.constants
        self._programs = (launch.programs, 1, 1)
        self._options = launch.options
        self._start: Callable[..., None] | None = None
        self._given: list[tuple[int, str]] = []
        self._described: list[tuple[int, str, dict[str, Any]]] = []
        known = launch.arguments | launch.constants
        self._values: list[Any] = []
        for index, argument in enumerate(inspect.signature(launch.kernel.fn).parameters):
            value, name = known[argument], operands.get(argument, argument)
            if isinstance(value, TensorDescriptor):
                self._described.append((index, name, vars(value) | {"base": None}))
                value = None
            elif (isinstance(value, Tensor) and argument not in KEPT) or argument in NUMBERS:
                self._given.append((index, name))
                value = None
            self._values.append(value)

    def run(self, given: dict[str, Any]) -> None:
        """Launch the kernel on the current device with the tensors and numbers of ``given``, by name."""
        values = self._values.copy()
        for index, name in self._given:
            values[index] = given[name]
        for index, name, fields in self._described:
            values[index] = _descriptor(fields, given[name])
        if self._start is not None:
            self._start(*values)
            return
        compiled = self.kernel[self._programs](*values, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._start = compiled[self._programs]


def _descriptor(fields: dict[str, Any], tensor: Tensor) -> TensorDescriptor:
    """A descriptor with known fields, without the checks of its constructor: they passed when the plan was made."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=tensor)
    return descriptor
