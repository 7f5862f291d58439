"""A module of which every adapter has its own parameters: each token is computed with those of its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .plan import TokenPlan

# x (..., in), weight, bias -> (..., out), each token for itself.
Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Values = tuple[Tensor, Tensor | None]


def beside(x: Tensor, compute: Compute, base: Values, own: Sequence[Values], plan: TokenPlan) -> Tensor:
    """What a module makes of each token with the parameters of its adapter, by PyTorch's own operations.

    One product per adapter: the parameters of a head are read once, and none are copied per token. An adapter without
    tokens gets no gradient.

    Args:
        x: (..., in).
        compute: The module's function.
        base: Weight and bias for tokens without adapter.
        own: Weight and bias of each of the D adapters.
        plan: Which tokens have which adapter.

    Returns:
        (..., out). Rows of the base's tokens are those of ``compute(x, *base)``, bit for bit.
    """
    tokens, ends = plan.by_adapter
    total = x.shape[:-1].numel()
    if len(own) == 1 and len(tokens) == total:
        return compute(x, *own[0])
    if len(tokens) == 0:
        return compute(x, *base)
    rows = x.reshape(total, x.shape[-1]).index_select(0, tokens)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = [compute(part, *values) for part, values in zip(rows.split(counts), own, strict=True) if len(part)]
    together = torch.cat(parts)
    if len(tokens) == total:
        places = torch.empty_like(tokens)
        places[tokens] = torch.arange(total, device=tokens.device)
        y = together.index_select(0, places)
    else:
        y = compute(x, *base).reshape(total, -1).index_copy_(0, tokens, together)
    return y.view(*x.shape[:-1], together.shape[-1])
