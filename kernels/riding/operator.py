"""The changed input and its gradients by the Triton kernels, with the contract of operator/backends/eager.py.

Shapes: x and g (T, in), h (T, r), core (S, c, r), row (r*S, in). Tensors are float32, float16 or bfloat16, the core has
any floating dtype. Callers have checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Riding, required
from tcurlora_ext.trace import stage

from ..configs import Config, table_for
from ..launch import aligned
from ..plans import device_of, layout, on, planned, precision, require_dtype, rows_of
from ..prepared import Prepared
from . import launch


def takes(adapter: Riding) -> bool:
    """Whether the kernels compute this adapter: c and r are at most ``launch.WIDEST``."""
    _, c, r = adapter.core.shape
    return 0 < c <= launch.WIDEST and 0 < r <= launch.WIDEST


class Call:
    """The operands of one call, and the key of its plan. ``data`` is x, or backward the gradient of x'."""

    def __init__(self, data: Tensor, adapter: Riding) -> None:
        require_dtype(data.dtype)
        columns, core, row, gain, slice_index, scale = adapter
        self.data, self.gradient_dtype = data, core.dtype
        self.operands: dict[str, Any] = {
            "row": rows_of(row), "columns": columns.contiguous(), "core": core.float().contiguous(),
            "gain": gain.float().contiguous(), "slice_index": slice_index, "scale": float(scale),
        }  # fmt: skip
        self.precision = precision()
        tensors = (data, *(tensor for tensor in self.operands.values() if isinstance(tensor, Tensor)))
        self.key = (data.dtype, data.device, core.dtype, *map(layout, tensors), self.precision)

    @property
    def core(self) -> Tensor:
        core: Tensor = self.operands["core"]
        return core

    def config(self, kernel: str) -> Config:
        table = table_for(device_of(self.data.device).name, aligned(self.data, self.operands["row"]))
        return table.config(kernel, self.data.dtype, self.data.shape[0])


class ChangePlan:
    """One launch for h and x'."""

    def __init__(self, call: Call, changed: Tensor, h: Tensor) -> None:
        self.launch = Prepared(
            launch.ride_launch(
                call.data, **call.operands, changed=changed, h=h, config=call.config("ride"), precision=call.precision
            )
        )

    def run(self, call: Call, changed: Tensor, h: Tensor) -> None:
        self.launch.run({"x": call.data, "changed": changed, "h": h, **call.operands})


class ChangeBackPlan:
    """One launch for dx, dh and the sums of the chunks of tokens, and one for the core's gradient."""

    def __init__(self, call: Call, h: Tensor | None, dh: Tensor | None, needs_x: bool) -> None:
        config = call.config("ride_back")
        self.workspace: tuple[int, ...] = ()
        workspace = None
        if h is not None:
            self.workspace = launch.workspace_shape(call.core, call.data.shape[0], config)
            workspace = call.core.new_empty(self.workspace)
            gradient = torch.empty_like(call.core, dtype=call.gradient_dtype)
            numbers = {name: call.operands[name] for name in ("gain", "slice_index", "scale")}
            self.sum = Prepared(launch.reduce_launch(workspace, **numbers, gradient=gradient))
        self.back = Prepared(
            launch.ride_back_launch(
                call.data, **call.operands, h=h, dh=dh, workspace=workspace, needs_x=needs_x, config=config,
                precision=call.precision,
            )
        )  # fmt: skip

    def run(self, call: Call, h: Tensor | None, dh: Tensor | None) -> Tensor | None:
        """Returns the core's gradient (S, c, r), None where h is."""
        given = {"g": call.data, "h": h, "dh": dh, **call.operands}
        if h is None:
            self.back.run(given)
            return None
        workspace = call.core.new_empty(self.workspace)
        gradient = torch.empty_like(call.core, dtype=call.gradient_dtype)
        given |= {"workspace": workspace, "gradient": gradient}
        self.back.run(given)
        self.sum.run(given)
        return gradient


def ride(x: Tensor, adapter: Riding) -> tuple[Tensor, Tensor]:
    """The changed input x' (T, in) of x (T, in), and h (T, r)."""
    call = Call(rows_of(x), adapter)
    changed, h = x.new_empty(x.shape), x.new_empty(x.shape[0], adapter.core.shape[2])
    if x.shape[0]:
        with on(x), stage("h = x row^T, x'[:, J] += h U^T"):
            planned(("ride", call.key), lambda: ChangePlan(call, changed, h)).run(call, changed, h)
    return changed, h


def ride_back(
    g: Tensor, x: Tensor | None, h: Tensor | None, adapter: Riding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of core and row; g, the gradient of x', becomes that of x in place where it is needed."""
    needs_x, needs_core, needs_row = needs
    dcore, drow = adapter.core.new_empty(0), g.new_empty(0)
    if not any(needs):
        return dcore, drow
    if not g.shape[0]:
        zeros = torch.contiguous_format
        dcore = torch.zeros_like(adapter.core, memory_format=zeros) if needs_core else dcore
        return dcore, torch.zeros_like(adapter.row, memory_format=zeros) if needs_row else drow
    call = Call(rows_of(g), adapter)
    hidden = rows_of(required(h, "h")) if needs_core else None
    dh = g.new_empty(g.shape[0], adapter.core.shape[2]) if needs_row else None
    key = ("ride_back", needs_x, needs_row, None if hidden is None else layout(hidden), call.key)
    with on(g), stage("dcore = p^T h, dx = d + p U R"):
        found = planned(key, lambda: ChangeBackPlan(call, hidden, dh, needs_x)).run(call, hidden, dh)
        dcore = dcore if found is None else found
    if dh is not None:
        drow = torch.zeros_like(adapter.row, memory_format=torch.contiguous_format)
        adapter._replace(row=drow).own_row.copy_(dh.T @ required(x, "x"))
    if needs_x and call.data is not g:
        g.copy_(call.data)  # its rows are not contiguous, and a copy was changed
    return dcore, drow
