"""Both forms of an adapted layer for a batch of many adapters, differentiable with respect to x, bias and the cores.

Shapes: x (..., in), T tokens in all; cores (D, ...) of the batch's D different adapters; other shapes as for one
adapter (:mod:`tcurlora_ext.maths.contract`). Sums are at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcurlora_ext.maths.contract import Factors, Riding
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.trace import stage

from .mixing import Mix, Ride
from .plan import TokenPlan


def ordinary(x: Tensor, weight: Tensor, bias: Tensor | None, call: Factors, adapters: int, plan: TokenPlan) -> Tensor:
    """``x W^T + bias + m col^T``, where m is the middle product of each token with its adapter's core.

    Args:
        x: (..., in).
        weight: (num_slices*out, in), frozen, in the dtype of x.
        bias: (num_slices*out,) or None.
        call: What the operator takes for one adapter, except that the core is (S, D*c, r): the cores of all adapters,
            one below the other.
        adapters: D.
        plan: Which tokens have which adapter.

    Returns:
        (..., num_slices*out) in the dtype of x.
    """
    x2 = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, call.core.dtype), torch.float32)
    middle = GroupedMiddle(call, wide)
    c = middle.c // adapters
    # (groups, n*w*D*c, w*r) -> (groups, D, n*w*c, w*r)
    blocks = middle.B.unflatten(1, (middle.n * middle.width, adapters, c)).transpose(1, 2).flatten(2, 3)
    with stage("h = x row^T"):
        h = x2 @ call.row.T
    with stage("m = h B^T"):
        m = Mix.apply(middle.by_group(h), blocks, plan).unflatten(-1, (middle.n, middle.width * c))
        m = middle.by_block(m, c, x.dtype)
    with stage("y = x W^T + bias"):
        y = nn.functional.linear(x2, weight, bias)
    with stage("y += m col^T"):
        # In place: rows of the base get zeros added, and stay as they are bit for bit.
        y.view(-1, call.col.shape[0]).addmm_(m.flatten(0, 1), call.col.T)
    return y.view(*x.shape[:-1], weight.shape[0])


def riding(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Riding, cores: Tensor, plan: TokenPlan) -> Tensor:
    """``x' W^T + bias``, where each token's x' is changed by its adapter's core.

    Args:
        x: (..., in).
        weight: (out, in), frozen, in the dtype of x.
        bias: (out,) or None.
        adapter: What the operator takes for one adapter; its core is not used.
        cores: U of the layer's slice of each adapter, (D, c, r).
        plan: Which tokens have which adapter.

    Returns:
        (..., out) in the dtype of x.
    """
    x2 = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, cores.dtype), torch.float32)
    matrices = (cores * (adapter.gain * adapter.scale).unsqueeze(1)).to(wide)
    changed = Ride.apply(x2, adapter.own_row, matrices, adapter.columns, plan)
    return nn.functional.linear(changed, weight, bias).view(*x.shape[:-1], weight.shape[0])
