"""The riding form for a batch of many adapters, differentiable with respect to x, bias and the cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.trace import stage

from .mixing import mixed, mixed_back
from .plan import TokenPlan


def riding(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Riding, cores: Tensor, plan: TokenPlan) -> Tensor:
    """``x' W^T + bias`` with ``x'[:, J] = x[:, J] + scale * h (diag(gain) U_t)^T``, U_t of token t's adapter.

    Args:
        x: (..., in).
        weight: (out, in), frozen, in the dtype of x.
        bias: (out,) or None.
        adapter: What the operator takes for one adapter; its core is not used.
        cores: U of the layer's slice of each adapter, (D, c, r).
        plan: Which tokens have which adapter.

    Returns:
        (..., out) in the dtype of x. Rows of the base's tokens are those of ``nn.functional.linear``.
    """
    x2 = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, cores.dtype), torch.float32)
    matrices = (cores * (adapter.gain * adapter.scale).unsqueeze(1)).to(wide)
    y: Tensor = _Riding.apply(x2, weight, bias, adapter.own_row, matrices, adapter.columns, plan)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Riding(torch.autograd.Function):
    """x (T, in), weight, bias, row R (r, in), matrices (D, c, r), columns (c,) -> y (T, out).

    Saved for backward: h (T, r) where the cores train, and the matrices.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor, matrices: Tensor, columns: Tensor,
        plan: TokenPlan,
    ) -> Tensor:  # fmt: skip
        with stage("h = x row^T"):
            h = x @ row.T
        with stage("x' = x, x'[:, J] += h U^T"):
            change = mixed(h.to(matrices.dtype)[None], matrices[None], plan)[0]
            changed = x.clone(memory_format=torch.contiguous_format)
            changed.index_copy_(1, columns, change.add_(x.index_select(1, columns)).to(x.dtype))
        ctx.save_for_backward(h if ctx.needs_input_grad[4] else None, weight, row, matrices, columns)
        ctx.plan = plan
        return nn.functional.linear(changed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, row, matrices, columns = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        dx = g @ weight if needs_x else None
        # Before a network's first adapted layer only the chosen features of g W are needed.
        p = g @ weight.index_select(1, columns) if dx is None else dx.index_select(1, columns)
        wide_h = None if h is None else h.to(matrices.dtype)[None]
        with stage("dcore = p^T h"):
            dh, dmatrices = mixed_back(
                p.to(matrices.dtype)[None], wide_h, matrices[None] if needs_x else None, ctx.plan, len(matrices)
            )
        if dx is not None and dh is not None:
            with stage("dx = d + p U R"):
                dx.addmm_(dh[0].to(dx.dtype), row)
        dbias = g.sum(0) if needs_bias else None
        return dx, None, dbias, None, None if dmatrices is None else dmatrices[0], None, None
