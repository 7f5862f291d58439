"""Forward and backward of a TCUR layer by the Triton kernels, with the contract of operator/backends/eager.py.

Shapes: x (..., in); weight (n*out, in), n slices stacked by rows; col (out, c*S); core (S, c, r); row (r*S, in).
Tensors are float32, float16 or bfloat16, the core has any floating dtype. Callers have checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients, required
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.trace import stage

from . import launch
from .configs import Config, Table, table_for
from .middle import Middle
from .plans import device_of, layout, on, planned, precision, require_dtype, rows_of
from .prepared import Prepared


class Call:
    """The operands of one call of the operator, and the key of its plan."""

    def __init__(self, data: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> None:
        self.data, self.weight, self.bias, self.factors = data, weight, bias, factors
        col, core, row, self.first_slice, self.n, self.scale, self.transform = factors
        self.col, self.row = rows_of(col), rows_of(row)
        self.core = core if core.dtype == torch.float32 and core.is_contiguous() else core.float().contiguous()
        self.tokens, self.dtype = data.shape[0], data.dtype
        self.precision = precision()
        self.key = (
            self.dtype, data.device, layout(data), layout(weight), layout(self.col), layout(self.row),
            layout(self.core), None if bias is None else layout(bias), self.n, self.transform, self.precision,
        )  # fmt: skip

    def given(self, **tensors: Tensor | None) -> dict[str, Any]:
        """What the kernels take, by name."""
        return {
            "weight": self.weight, "bias": self.bias, "col": self.col, "core": self.core, "row": self.row,
            "first_slice": self.first_slice, "scale": float(self.scale), **tensors,
        }  # fmt: skip

    def padded(self, *shape: int) -> Tensor:
        """An uninitialised tensor whose rows are 16-byte aligned, so that a descriptor can address them."""
        width = -(-shape[-1] // 8) * 8
        return self.data.new_empty(*shape[:-1], width)[..., : shape[-1]]

    def grouped_middle(self, dtype: torch.dtype) -> GroupedMiddle:
        """The middle product in PyTorch operations, for groups wider than a tile and for dcol."""
        return GroupedMiddle(self.factors, dtype)


class Plan:
    """How the kernels of a call are launched: what depends on shapes, strides, dtypes and alignment alone."""

    def __init__(self, call: Call) -> None:
        require_dtype(call.dtype)
        operands = call.data, call.weight, call.col, call.row
        middle = Middle.of(call.factors.core, call.first_slice, call.n, call.scale, call.transform)
        self.middle = replace(middle, core=middle.core.to("meta"))  # a plan outlives its first call's tensors
        self.device = device_of(call.data.device)
        self.table: Table = table_for(self.device.name, launch.aligned(*operands))
        self.tokens, self.dtype, self.n = call.tokens, call.dtype, call.n
        self.slice_width = call.col.shape[0]
        # Descriptors take 32-bit coordinates; those of m and p go up to n slices of T rows.
        small = call.n * call.tokens < 2**31
        self.descriptors = self.device.descriptors and small and launch.describable(*operands)

    def config(self, kernel: str) -> Config:
        return self.table.config(kernel, self.dtype, self.tokens)

    def fits_one_launch(self, kernel: str, depth: int, width: int) -> bool:
        """Whether all groups fit into one tile and computing h (or p) again in every tile of columns is cheap.

        ``depth`` and ``width`` are K and N of the base product.
        """
        q = self.middle.q
        if q > self.table.fused_q:
            return False
        config = self.config(kernel)
        again = 2.0 * self.tokens * depth * q * -(-width // config.block_n)
        return q <= config.block_q and again <= self.table.fused_flops

    def slice_descriptors(self, kernel: str) -> bool:
        """Whether to use descriptors for g: only if no tile can have columns of the next slice."""
        return self.descriptors and (self.n == 1 or self.slice_width % self.config(kernel).block_k == 0)


class ForwardPlan(Plan):
    """One launch for h and y; or one for h and m, or PyTorch operations where a group is too wide, and one for y."""

    def __init__(self, call: Call, h: Tensor, y: Tensor) -> None:
        super().__init__(call)
        x, middle = call.data, self.middle
        self.whole = self.project = None
        if self.fits_one_launch("fused", x.shape[1], y.shape[1]):
            self.whole = Prepared(
                launch.fused_launch(
                    x, call.weight, call.bias, call.row, call.col, middle, h, y, self.config("fused"), call.precision,
                    self.descriptors,
                )
            )  # fmt: skip
            return
        m = call.padded(call.n, call.tokens, call.col.shape[1])
        how = call.precision, self.descriptors
        if middle.fits_a_tile:
            self.project = Prepared(launch.project_launch(x, call.row, middle, h, m, self.config("project"), *how))
        self.expand = Prepared(
            launch.expand_launch(
                x, call.weight, m, call.col, call.bias, y, call.n, False, self.config("expand"), *how,
                self.device.multiprocessors,
            ),
            a="x", b="weight", inner="m", factor="col", result="y",
        )  # fmt: skip

    def run(self, call: Call, h: Tensor, y: Tensor) -> None:
        given = call.given(x=call.data, h=h, y=y)
        if self.whole is not None:
            with stage("h = x row^T, m = h B^T, y = x W^T + bias + m col^T"):
                self.whole.run(given)
            return
        m = given["m"] = call.padded(call.n, call.tokens, call.col.shape[1])
        with stage("h = x row^T, m = h B^T"):
            if self.project is not None:
                self.project.run(given)
            else:
                torch.mm(call.data, call.row.T, out=h)
                m.copy_(call.grouped_middle(call.dtype).forward(h).transpose(0, 1))
        with stage("y = x W^T + bias + m col^T"):
            self.expand.run(given)


class BackwardPlan(Plan):
    """One launch for p and dx; or one for p and dh, or PyTorch operations where a group is too wide, and one for dx."""

    def __init__(self, call: Call, p: Tensor, dh: Tensor, dx: Tensor | None, needs_dh: bool) -> None:
        super().__init__(call)
        g, middle = call.data, self.middle
        self.whole = self.project = self.expand = None
        if dx is not None and not needs_dh and self.fits_one_launch("fused_back", g.shape[1], dx.shape[1]):
            self.whole = Prepared(
                launch.fused_back_launch(
                    g, call.weight, call.row, call.col, middle, p, dx, self.config("fused_back"), call.precision,
                    self.slice_descriptors("fused_back"),
                )
            )  # fmt: skip
            return
        if middle.fits_a_tile:
            self.project = Prepared(
                launch.project_back_launch(
                    g, call.col, middle, p, dh, self.config("project_back"), call.precision,
                    self.slice_descriptors("project_back"),
                )
            )  # fmt: skip
        if dx is not None:
            self.expand = Prepared(
                launch.expand_launch(
                    g, call.weight, dh, call.row, None, dx, 1, True, self.config("expand_back"), call.precision,
                    self.descriptors, self.device.multiprocessors,
                ),
                a="g", b="weight", inner="dh", factor="row", result="dx",
            )  # fmt: skip

    def run(self, call: Call, p: Tensor, dh: Tensor, dx: Tensor | None) -> None:
        given = call.given(g=call.data, p=p, dh=dh, dx=dx)
        if self.whole is not None:
            with stage("p = g col, dh = p B, dx = g W + dh row"):
                self.whole.run(given)
            return
        with stage("p = g col, dh = p B"):
            if self.project is not None:
                self.project.run(given)
            else:
                p.copy_(torch.matmul(call.data.unflatten(1, (call.n, -1)).transpose(0, 1), call.col))
                grouped = call.grouped_middle(call.dtype)
                dh.copy_(grouped.backward(grouped.by_group(p.transpose(0, 1)), call.dtype))
        if self.expand is not None:
            with stage("dx = g W + dh row"):
                self.expand.run(given)


class CoreGradientPlan(Plan):
    """Two launches for the core's gradient (S, c, r) float32, or PyTorch operations where a group is too wide."""

    def __init__(self, call: Call, p: Tensor, h: Tensor) -> None:
        super().__init__(call)
        self.stages: tuple[Prepared, ...] = ()
        if self.middle.fits_a_tile:
            config = self.config("core_gradient")
            self.workspace = launch.core_gradient_workspace(self.middle, call.tokens, config)
            workspace = torch.empty(self.workspace, dtype=torch.float32, device=p.device)
            both = launch.core_gradient_launches(
                p, h, self.middle, workspace, torch.empty_like(call.core), config, call.precision
            )
            self.stages = tuple(map(Prepared, both))

    def run(self, call: Call, p: Tensor, h: Tensor) -> Tensor:
        if not self.stages:
            grouped = call.grouped_middle(torch.float32)
            return grouped.core_gradient(grouped.by_group(p.transpose(0, 1)), h)
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=p.device)
        gradient = torch.empty_like(call.core)
        given = call.given(p=p, h=h, workspace=workspace, gradient=gradient)
        for one in self.stages:
            one.run(given)
        return gradient


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns y (..., n*out) and h (T, r*S)."""
    x2 = rows_of(x)
    call = Call(x2, weight, bias if bias is None or bias.is_contiguous() else bias.contiguous(), factors)
    # Autograd lets only a tensor that is no view be changed in place later (ReLU(inplace=True)): y has its final shape.
    y = x2.new_empty(*x.shape[:-1], weight.shape[0])
    h = x2.new_empty(x2.shape[0], factors.row.shape[0])
    if call.tokens:
        rows = y.view(-1, weight.shape[0])
        with on(x2):
            planned(("forward", call.key), lambda: ForwardPlan(call, h, rows)).run(call, h, rows)
    return y, h


def backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, factors: Factors, needs: Sequence[bool]
) -> Gradients:
    """Gradients of (x, weight, bias, col, core, row); an empty tensor for each that ``needs`` does not ask for.

    x may be None where no gradient of weight or row is needed and h is given. h may be None where x is given: it is
    then computed again.
    """
    needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row = needs
    col, core, row = factors[:3]
    # Separate tensors, because outputs of an operator must not share memory.
    dx, dweight, dbias, dcol, drow = (g.new_empty(0) for _ in range(5))
    dcore = core.new_empty(0)
    g2 = rows_of(g)
    x2 = None if x is None else rows_of(x)
    if needs_weight:
        dweight = g2.T @ required(x2, "x")
    if needs_bias:
        dbias = g2.sum(0)
    if not (needs_x or needs_col or needs_core or needs_row):
        return dx, dweight, dbias, dcol, dcore, drow
    call = Call(g2, weight, None, factors)
    if needs_x:
        dx = g2.new_empty(call.tokens, row.shape[1])
    if needs_core or needs_col:
        with nullcontext() if h is not None else stage("h = x row^T"):
            h = required(x2, "x or h") @ row.T if h is None else rows_of(h)
    with on(g2):
        p, dh = _backward(call, dx if needs_x else None, needs_row)
        if needs_core:
            with stage("dcore = diag(p^T h)"):
                dcore = _core_gradient(call, p, required(h, "h")).to(core.dtype)
    if needs_col:
        m = call.grouped_middle(call.dtype).forward(required(h, "h"))
        dcol = g2.reshape(-1, col.shape[0]).T @ m.flatten(0, 1)
    if needs_row:
        drow = dh.T @ required(x2, "x")
    if needs_x:
        dx = dx.view(*g.shape[:-1], row.shape[1])
    return dx, dweight, dbias, dcol, dcore, drow


def _backward(call: Call, dx: Tensor | None, needs_dh: bool) -> tuple[Tensor, Tensor]:
    """Returns p (n, T, c*S) and, where needed, dh (T, r*S); fills ``dx`` (T, in)."""
    p = call.padded(call.n, call.tokens, call.col.shape[1])
    dh = call.padded(call.tokens, call.row.shape[0])
    if call.tokens:
        key = ("backward", dx is None, needs_dh, call.key)
        planned(key, lambda: BackwardPlan(call, p, dh, dx, needs_dh)).run(call, p, dh, dx)
    return p, dh


def _core_gradient(call: Call, p: Tensor, h: Tensor) -> Tensor:
    """The core's gradient (S, c, r), float32."""
    if not call.tokens:
        return torch.zeros_like(call.core)
    return planned(("core", layout(h), call.key), lambda: CoreGradientPlan(call, p, h)).run(call, p, h)
