"""The ordinary form for a batch of many adapters, differentiable with respect to x, bias and the cores.

The middle product m = B_l h of one adapter takes the blocks of B_l, made from the core's by phases. With many adapters
those blocks would be as many again in each layer. So the phases are applied to the tokens instead, after the product
with the core: in a group of w coupled blocks, ``z_jk = u_k h_j``, and m is a sum of the z with the phases as weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.grouped import Groups
from tcurlora_ext.trace import stage

from .mixing import mixed, mixed_back
from .plan import TokenPlan


def ordinary(x: Tensor, weight: Tensor, bias: Tensor | None, call: Factors, cores: Tensor, plan: TokenPlan) -> Tensor:
    """``x W^T + bias + m col^T``, where m is the middle product of each token with its adapter's core.

    Args:
        x: (..., in).
        weight: (num_slices*out, in), frozen, in the dtype of x.
        bias: (num_slices*out,) or None.
        call: What the operator takes for one adapter; its core is not used.
        cores: The core of each adapter, (S, D, c, r), the stack's blocks first.
        plan: Which tokens have which adapter.

    Returns:
        (..., num_slices*out) in the dtype of x. Rows of the base's tokens are those of ``nn.functional.linear``.
    """
    x2 = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, cores.dtype), torch.float32)
    y: Tensor = _Ordinary.apply(x2, weight, bias, call.col, call.row, cores.to(wide), call, plan)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Middle:
    """The middle product of one call for cores (S, D, c, r), and its gradients; h (T, r*S), m and p (T, n, c*S)."""

    def __init__(self, call: Factors, cores: Tensor, plan: TokenPlan) -> None:
        _, self.adapters, self.c, self.r = cores.shape
        self.plan = plan.blocks
        self.groups = groups = Groups(call._replace(core=cores), cores.dtype)
        # (groups, D, w*c, r): the cores of a group, one below the other.
        parts = groups.grouped(cores, 0).unflatten(0, (groups.groups, groups.width))
        self.matrices = parts.transpose(1, 2).flatten(2, 3)
        # The weights of z (j, k, c) in m (l, i, c) as matrices (groups, w*w*c, n*w*c): one product for all tokens.
        weights = groups.mixing.unflatten(2, (groups.width, groups.width)).permute(0, 3, 4, 1, 2) * call.scale
        eye = torch.eye(self.c, dtype=cores.dtype, device=cores.device)
        self.phases = (weights[:, :, :, None, :, :, None] * eye[:, None, None, :]).flatten(4).flatten(1, 3)

    def forward(self, h: Tensor) -> Tensor:
        z = mixed(self.groups.by_group(h), self.matrices, self.plan, self.groups.width)
        m = torch.bmm(z, self.phases).unflatten(-1, (self.groups.n, -1))
        return self.groups.by_block(m, self.c, h.dtype)

    def backward(self, p: Tensor, h: Tensor | None, needs_h: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of h (T, r*S), in the dtype of p, where it is needed, and of the cores where h is given."""
        groups = self.groups
        dz = torch.bmm(groups.by_group(p), self.phases.mT)
        grouped_h = None if h is None else groups.by_group(h)
        matrices = self.matrices if needs_h else None
        dh, dmatrices = mixed_back(dz, grouped_h, matrices, self.plan, self.adapters, groups.width)
        dcores = None
        if dmatrices is not None:
            blocks = dmatrices.unflatten(2, (groups.width, self.c)).transpose(1, 2).flatten(0, 1)
            dcores = groups.ungrouped(blocks)
        return None if dh is None else groups.by_block(dh, self.r, p.dtype), dcores


class _Ordinary(torch.autograd.Function):
    """x (T, in), weight, bias, col, row, cores (S, D, c, r) -> y (T, n*out).

    Saved for backward: h (T, r*S) where the cores train, and the cores.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, col: Tensor, row: Tensor, cores: Tensor,
        call: Factors, plan: TokenPlan,
    ) -> Tensor:  # fmt: skip
        with stage("h = x row^T"):
            h = x @ row.T
        with stage("m = h B^T"):
            m = _Middle(call, cores, plan).forward(h)
        with stage("y = x W^T + bias"):
            y = nn.functional.linear(x, weight, bias)
        with stage("y += m col^T"):
            # In place: rows of the base get zeros added, and stay as they are bit for bit.
            y.view(-1, col.shape[0]).addmm_(m.flatten(0, 1), col.T)
        ctx.save_for_backward(h if ctx.needs_input_grad[5] else None, weight, col, row, cores)
        ctx.plan, ctx.call = plan, call._replace(core=call.core.detach()[:0])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, col, row, cores = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        with stage("p = g col"):
            p = (g.reshape(-1, col.shape[0]) @ col).view(len(g), -1, col.shape[1])
        with stage("dcore = diag(p^T h)"):
            dh, dcores = _Middle(ctx.call, cores, ctx.plan).backward(p, h, needs_x)
        dx = None
        if dh is not None:
            with stage("dx = g W + dh row"):
                dx = (g @ weight).addmm_(dh, row)
        return dx, None, g.sum(0) if needs_bias else None, None, None, dcores, None, None
