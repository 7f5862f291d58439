"""Forward and backward of a TCUR layer by the Triton kernels, with the contract of operator/backends/eager.py.

Shapes: x (..., in); weight (n*out, in), n slices stacked by rows; col (out, c*S); core (S, c, r); row (r*S, in).
Tensors are float32, float16 or bfloat16, the core has any floating dtype. Callers have checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients, required
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.trace import stage

from . import launch
from .configs import Config, Table, table_for
from .middle import Middle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which launches depend; ``descriptors``: it has a tensor copy engine."""

    name: str
    multiprocessors: int
    descriptors: bool


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The GPU of a tensor; for the CPU a small device that stands for Triton's interpreter."""
    if device.type != "cuda":
        return Device("Triton's interpreter", 3, True)
    properties = torch.cuda.get_device_properties(device)
    copies = properties.major >= 9 and torch.version.hip is None
    return Device(properties.name, properties.multi_processor_count, copies)


def precision() -> str:
    """The precision of float32 products by PyTorch's setting for CUDA: "tf32" or "ieee" (full float32)."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; allow_tf32 raises once the new setting has been used
        setting = matmul.fp32_precision
        if setting == "none":
            setting = getattr(torch.backends, "fp32_precision", "none")
        return "tf32" if setting == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _rows_of(tensor: Tensor) -> Tensor:
    """Reshape (..., width) to (T, width), copying where a row is not contiguous."""
    matrix = tensor.detach().reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"x is {tensor.dtype}, the Triton kernels compute in {names}; use backend='eager'")


class Call:
    """The operands of one call of the operator, and how its kernels are launched."""

    def __init__(self, data: Tensor, weight: Tensor, factors: Factors) -> None:
        _check_dtype(data)
        self.data, self.weight, self.factors, self.n = data, weight.detach(), factors, factors.num_slices
        self.col, self.row = _rows_of(factors.col), _rows_of(factors.row)
        self.tokens, self.dtype = data.shape[0], data.dtype
        self.middle = Middle.of(factors.core, *factors[3:])
        self.device = device_of(data.device)
        self.table: Table = table_for(self.device.name, launch.aligned(data, self.weight, self.col, self.row))
        self.precision = precision()
        # Descriptors take 32-bit coordinates; those of m and p go up to n slices of T rows.
        small = self.n * self.tokens < 2**31
        self.descriptors = (
            self.device.descriptors and small and launch.describable(data, self.weight, self.col, self.row)
        )

    def grouped_middle(self, dtype: torch.dtype) -> GroupedMiddle:
        """The middle product in PyTorch operations, for groups wider than a tile and for dcol."""
        return GroupedMiddle(self.factors, dtype)

    def padded(self, *shape: int) -> Tensor:
        """An uninitialised tensor whose rows are 16-byte aligned, so that a descriptor can address them."""
        width = -(-shape[-1] // 8) * 8
        return self.data.new_empty(*shape[:-1], width)[..., : shape[-1]]

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
        return self.descriptors and (self.n == 1 or self.col.shape[0] % self.config(kernel).block_k == 0)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns y (..., n*out) and h (T, r*S)."""
    x2 = _rows_of(x)
    call = Call(x2, weight, factors)
    y = x2.new_empty(x2.shape[0], weight.shape[0])
    h = x2.new_empty(x2.shape[0], factors.row.shape[0])
    if call.tokens:
        with _on(x2):
            _forward(call, None if bias is None else bias.detach().contiguous(), y, h)
    return y.view(*x.shape[:-1], weight.shape[0]), h


def _forward(call: Call, bias: Tensor | None, y: Tensor, h: Tensor) -> None:
    x, middle = call.data, call.middle
    if call.fits_one_launch("fused", x.shape[1], y.shape[1]):
        with stage("h = x row^T, m = h B^T, y = x W^T + bias + m col^T"):
            launch.fused_launch(
                x, call.weight, bias, call.row, call.col, middle, h, y, call.config("fused"), call.precision,
                call.descriptors,
            ).run()  # fmt: skip
        return
    m = call.padded(call.n, call.tokens, call.col.shape[1])
    with stage("h = x row^T, m = h B^T"):
        if middle.fits_a_tile:
            launch.project_launch(
                x, call.row, middle, h, m, call.config("project"), call.precision, call.descriptors
            ).run()
        else:
            torch.mm(x, call.row.T, out=h)
            m.copy_(call.grouped_middle(call.dtype).forward(h).transpose(0, 1))
    with stage("y = x W^T + bias + m col^T"):
        launch.expand_launch(
            x, call.weight, m, call.col, bias, y, call.n, False, call.config("expand"), call.precision,
            call.descriptors, call.device.multiprocessors,
        ).run()  # fmt: skip


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
    g2 = _rows_of(g)
    x2 = None if x is None else _rows_of(x)
    if needs_weight:
        dweight = g2.T @ required(x2, "x")
    if needs_bias:
        dbias = g2.sum(0)
    if not (needs_x or needs_col or needs_core or needs_row):
        return dx, dweight, dbias, dcol, dcore, drow
    call = Call(g2, weight, factors)
    if needs_x:
        dx = g2.new_empty(call.tokens, row.shape[1])
    if needs_core or needs_col:
        with nullcontext() if h is not None else stage("h = x row^T"):
            h = required(x2, "x or h") @ row.T if h is None else _rows_of(h)
    with _on(g2):
        p, dh = _backward(call, dx, needs_x, needs_row)
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


def _backward(call: Call, dx: Tensor, needs_x: bool, needs_dh: bool) -> tuple[Tensor, Tensor]:
    """Returns p (n, T, c*S) and, where needed, dh (T, r*S); fills ``dx`` (T, in)."""
    g, middle = call.data, call.middle
    p = call.padded(call.n, call.tokens, call.col.shape[1])
    dh = call.padded(call.tokens, call.row.shape[0])
    if not call.tokens:
        return p, dh
    if needs_x and not needs_dh and call.fits_one_launch("fused_back", g.shape[1], dx.shape[1]):
        with stage("p = g col, dh = p B, dx = g W + dh row"):
            launch.fused_back_launch(
                g, call.weight, call.row, call.col, middle, p, dx, call.config("fused_back"), call.precision,
                call.slice_descriptors("fused_back"),
            ).run()  # fmt: skip
        return p, dh
    with stage("p = g col, dh = p B"):
        if middle.fits_a_tile:
            launch.project_back_launch(
                g, call.col, middle, p, dh, call.config("project_back"), call.precision,
                call.slice_descriptors("project_back"),
            ).run()  # fmt: skip
        else:
            p.copy_(torch.matmul(g.unflatten(1, (call.n, -1)).transpose(0, 1), call.col))
            grouped = call.grouped_middle(call.dtype)
            dh.copy_(grouped.backward(grouped.by_group(p.transpose(0, 1)), call.dtype))
    if needs_x:
        with stage("dx = g W + dh row"):
            launch.expand_launch(
                g, call.weight, dh[None], call.row, None, dx, 1, True, call.config("expand_back"), call.precision,
                call.descriptors, call.device.multiprocessors,
            ).run()  # fmt: skip
    return p, dh


def _core_gradient(call: Call, p: Tensor, h: Tensor) -> Tensor:
    """The core's gradient (S, c, r), float32."""
    if not call.tokens:
        return torch.zeros_like(call.middle.core)
    if not call.middle.fits_a_tile:
        grouped = call.grouped_middle(torch.float32)
        return grouped.core_gradient(grouped.by_group(p.transpose(0, 1)), h)
    gradient = torch.empty_like(call.middle.core)
    for one in launch.core_gradient_launches(p, h, call.middle, gradient, call.config("core_gradient"), call.precision):
        one.run()
    return gradient
