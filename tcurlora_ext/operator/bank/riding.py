"""The riding form for a batch of many adapters, differentiable with respect to x, bias and the cores.

The two steps between the base's products are in C++ for tensors on the CPU, where the extension is built, and PyTorch
operations otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends.native import extension
from tcurlora_ext.trace import stage

from .mixing import mixed, mixed_back
from .plan import TokenPlan


class Cores(NamedTuple):
    """What the tokens of a layer ride on.

    Attributes:
        cores: U of each adapter, (D, c, r), in at least float32.
        columns: The chosen input features, (c,) int64.
        gain: What each column is multiplied by, (c,), in the dtype of the cores.
        scale: The factor of C U R.
    """

    cores: Tensor
    columns: Tensor
    gain: Tensor
    scale: float

    @property
    def factors(self) -> Tensor:
        """``scale * gain`` as a column, (c, 1)."""
        return (self.gain * self.scale).unsqueeze(1)


def has_kernels(x: Tensor, cores: Tensor) -> bool:
    """Whether the C++ kernels compute this batch: on the CPU, with sums in the dtype of the cores."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.device.type == "cpu" and cores.dtype == wide and extension() is not None


def riding(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Riding, cores: Tensor, plan: TokenPlan) -> Tensor:
    """``x' W^T + bias`` with ``x'[:, J] = x[:, J] + scale * h (diag(gain) U_t)^T``, U_t of token t's adapter.

    Args:
        x: (..., in).
        weight: (out, in), frozen, in the dtype of x.
        bias: (out,) or None.
        adapter: What the operator takes for one adapter; its core is not used.
        cores: U of all slices of the stack, or of the layer's alone, of each adapter: (D, S or 1, c, r).
        plan: Which tokens have which adapter.

    Returns:
        (..., out) in the dtype of x. Rows of the base's tokens are those of ``nn.functional.linear``.
    """
    if not torch.is_grad_enabled() and has_kernels(x, cores):
        columns, _, row, gain, at, scale = adapter
        result: Tensor = torch.ops.tcurlora.riding_many(
            x, weight, bias, columns, cores, row, gain, at, scale, plan.owners
        )
        return result
    x2 = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, cores.dtype), torch.float32)
    own = cores.flatten(0, 1) if cores.shape[1] == 1 else cores[:, adapter.slice_index]
    y: Tensor = _Riding.apply(
        x2, weight, bias, adapter.own_row, own.to(wide), adapter.columns, adapter.gain.to(wide), adapter.scale, plan
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _change(x: Tensor, row: Tensor, on: Cores, plan: TokenPlan) -> tuple[Tensor, Tensor]:
    """x' (T, in) and h (T, r)."""
    if has_kernels(x, on.cores):
        changed, h = torch.ops.tcurlora.ride_many(x, row, *on, plan.owners)
        return changed, h
    with stage("h = x row^T"):
        h = x @ row.T
    with stage("x' = x, x'[:, J] += h U^T"):
        change = mixed(h.to(on.cores.dtype)[None], (on.cores * on.factors)[None], plan.blocks)[0]
        changed = x.clone(memory_format=torch.contiguous_format)
        changed.index_copy_(1, on.columns, change.add_(x.index_select(1, on.columns)).to(x.dtype))
    return changed, h


def _change_back(
    g: Tensor, h: Tensor | None, on: Cores, plan: TokenPlan, needs_h: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From g (T, in), whose features ``on.columns`` are p, or from p: the gradients of h where needed, and of cores."""
    if has_kernels(g, on.cores):
        dh, dcores = torch.ops.tcurlora.ride_many_backward(g, h, *on, *plan.by_adapter, needs_h)
        return dh if needs_h else None, None if h is None else dcores
    wide = on.cores.dtype
    with stage("dcore = p^T h, dh = p U"):
        p = g.index_select(1, on.columns).to(wide).mul_(on.factors.T)
        dh, dcores = mixed_back(
            p[None], None if h is None else h.to(wide)[None], on.cores[None] if needs_h else None, plan.blocks,
            len(on.cores),
        )  # fmt: skip
    return None if dh is None else dh[0].to(g.dtype), None if dcores is None else dcores[0]


class _Riding(torch.autograd.Function):
    """x (T, in), weight, bias, row R (r, in), cores (D, c, r), columns (c,), gain (c,), scale -> y (T, out).

    Saved for backward: h (T, r) where the cores train, and the cores.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor, cores: Tensor, columns: Tensor,
        gain: Tensor, scale: float, plan: TokenPlan,
    ) -> Tensor:  # fmt: skip
        changed, h = _change(x, row, Cores(cores, columns, gain, scale), plan)
        ctx.save_for_backward(h if ctx.needs_input_grad[4] else None, weight, row, cores, columns, gain)
        ctx.scale, ctx.plan = scale, plan
        return nn.functional.linear(changed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, row, cores, columns, gain = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        if needs_x:
            p, chosen = g @ weight, columns
        else:  # before a network's first adapted layer only the chosen features of g W are needed
            p, chosen = g @ weight.index_select(1, columns), torch.arange(len(columns), device=columns.device)
        dh, dcores = _change_back(p, h, Cores(cores, chosen, gain, ctx.scale), ctx.plan, needs_x)
        if dh is not None:
            with stage("dx = d + p U R"):
                p.addmm_(dh, row)
        return p if needs_x else None, None, g.sum(0) if needs_bias else None, None, dcores, *[None] * 4
