"""The riding form as functional PyTorch operations: for exporters, torch.func, and an adapter with dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.maths.contract import Riding

from .arguments import split


def riding(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """What ``torch.ops.tcurlora.riding`` computes, by its flat arguments."""
    return nn.functional.linear(changed(x, x, split(*rest)[0]), weight, bias)


def ride(x: Tensor, *rest: Any) -> Tensor:
    """What ``torch.ops.tcurlora.ride`` computes, by its flat arguments."""
    return changed(x, x, split(*rest)[0])


def changed(x: Tensor, seen: Tensor, adapter: Riding) -> Tensor:
    """The changed input x' (..., in) of x, where the adapter sees ``seen`` in place of x: x with dropout."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = nn.functional.linear(seen, adapter.own_row)
    chosen = x.index_select(-1, adapter.columns).to(wide)
    change = nn.functional.linear(h.to(wide), adapter.mixing.to(wide))
    return x.index_copy(-1, adapter.columns, (chosen + change).to(x.dtype))
