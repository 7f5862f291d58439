"""The product of every token with its own adapter's core, and the changed input of the riding form, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcurlora_ext.trace import stage

from .plan import TokenPlan


class Mix(torch.autograd.Function):
    """``m_t = A_t h_t`` in each group, A_t being the matrix of token t's adapter; zero for tokens of the base.

    h (G, T, k) and matrices (G, D, p, k), in one dtype of at least float32 -> m (G, T, p). Saved for backward: each
    where the other needs a gradient.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, matrices: Tensor, plan: TokenPlan) -> Tensor:
        needs_h, needs_matrices, _ = ctx.needs_input_grad
        ctx.save_for_backward(h if needs_matrices else None, matrices if needs_h else None)
        ctx.plan, ctx.adapters = plan, matrices.shape[1]
        return _mixed(h, matrices, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, matrices = ctx.saved_tensors
        return *_mixed_back(g, h, matrices, ctx.plan, ctx.adapters), None


class Ride(torch.autograd.Function):
    """The changed input x' of the riding form: ``x'[:, J] = x[:, J] + A_t h_t`` with ``h = x R^T``.

    x (T, in); row R (r, in); matrices (D, c, r) = scale * diag(gain) U in at least float32; columns J (c,) -> x'
    (T, in). Rows of x' of the base's tokens equal those of x. Saved for backward: h (T, r) and the matrices.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, matrices: Tensor, columns: Tensor, plan: TokenPlan) -> Tensor:
        with stage("h = x row^T"):
            h = x @ row.T
        with stage("x' = x, x'[:, J] += h U^T"):
            change = _mixed(h.to(matrices.dtype)[None], matrices[None], plan)[0]
            changed = x.clone(memory_format=torch.contiguous_format)
            changed.index_copy_(1, columns, change.add_(x.index_select(1, columns)).to(x.dtype))
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, row, matrices, columns)
        ctx.plan = plan
        return changed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, row, matrices, columns = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        with stage("p = d[:, J]"):
            p = g.index_select(1, columns).to(matrices.dtype)[None]
        wide_h = None if h is None else h.to(matrices.dtype)[None]
        dh, gradient = _mixed_back(p, wide_h, matrices[None] if needs_x else None, ctx.plan, len(matrices))
        dx = None
        if dh is not None:
            with stage("dx = d + p U R"):
                dx = torch.addmm(g, dh[0].to(g.dtype), row)
        return dx, None, None if gradient is None else gradient[0], None, None


def _mixed(h: Tensor, matrices: Tensor, plan: TokenPlan) -> Tensor:
    return plan.collect(torch.bmm(plan.spread(h), plan.of_blocks(matrices).mT), h.shape[1])


def _mixed_back(
    g: Tensor, h: Tensor | None, matrices: Tensor | None, plan: TokenPlan, adapters: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of h, where the matrices are given, and of the matrices, where h is given; g (G, T, p)."""
    blocks = plan.spread(g)
    dh = dmatrices = None
    if matrices is not None:
        dh = plan.collect(torch.bmm(blocks, plan.of_blocks(matrices)), g.shape[1])
    if h is not None:
        with stage("dcore = p^T h"):
            h_blocks = plan.spread(h)
            # An outer product of each token: as a batched product it takes eight times as long.
            products = blocks.mT * h_blocks if plan.size == 1 else torch.bmm(blocks.mT, h_blocks)
            dmatrices = plan.sum_by_adapter(products, adapters)
    return dh, dmatrices
