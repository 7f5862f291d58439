"""The folded form in PyTorch operations: forward and backward of a TCUR layer without an (out x in) tensor.

Shapes: x (..., in); weight (n*out, in), n slices stacked by rows; col (out, c*S); core (S, c, r) in the slice
transform's coordinates; row (r*S, in). T is the number of rows of x. Notation and derivation: docs/maths.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Gradients, Riding, required
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.operator.checks import check
from tcurlora_ext.trace import stage

from .base import Backend


def _rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns y (..., n*out) and h (T, r*S). Raises ValueError where the tensors do not fit together."""
    check(x, weight, bias, factors)
    col, row = factors.col, factors.row
    x2 = _rows_of(x)
    with stage("h = x row^T"):
        h = x2 @ row.T
    with stage("m = h B^T"):
        m = GroupedMiddle(factors, x.dtype).forward(h)
    # The base is computed as by nn.Linear, and delta is added in place: a zero core gives the base's y bit for bit.
    with stage("y = x W^T + bias"):
        y = torch.nn.functional.linear(x2, weight, bias)
    with stage("y += m col^T"):
        y.view(-1, col.shape[0]).addmm_(m.flatten(0, 1), col.T)
    # Not a view to autograd, which lets no view of a custom function be changed in place later (ReLU(inplace=True)).
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]]), h


def backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, factors: Factors, needs: Sequence[bool]
) -> Gradients:
    """Gradients of (x, weight, bias, col, core, row); an empty tensor for each that ``needs`` does not ask for.

    x may be None where no gradient of weight or row is needed and h is given. h may be None where x is given: it is
    then computed again.
    """
    needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row = needs
    col, core, row, _, n, *_ = factors
    gradients = [g.new_empty(0), g.new_empty(0), g.new_empty(0), g.new_empty(0), core.new_empty(0), g.new_empty(0)]
    g2 = _rows_of(g)
    x2 = None if x is None else _rows_of(x)
    if needs_weight:
        gradients[1] = g2.T @ required(x2, "x")
    if needs_bias:
        gradients[2] = g2.sum(0)
    if not (needs_x or needs_col or needs_core or needs_row):
        return _six(gradients)

    # Sums over all tokens are float32. Then p is widened once, for dh too: a kernel less than with both forms of it.
    wide = torch.promote_types(g.dtype, torch.float32) if needs_core else g.dtype
    middle = GroupedMiddle(factors, wide)
    g_slices = g2.reshape(-1, col.shape[0])
    with stage("p = g col"):
        p = middle.by_group((g_slices @ col).view(-1, n, col.shape[1]))
    if needs_col or needs_core:
        if h is None:
            with stage("h = x row^T"):
                h = required(x2, "x or h") @ row.T
        if needs_core:
            with stage("dcore = diag(p^T h)"):
                gradients[4] = middle.core_gradient(p, h).to(core.dtype)
        if needs_col:
            gradients[3] = g_slices.T @ middle.forward(h).flatten(0, 1)
    if needs_x or needs_row:
        with stage("dh = p B"):
            dh = middle.backward(p, g.dtype)
        del p  # n*c*S elements per token, more than x has for a fused projection: freed before dx is allocated
        if needs_x:
            with stage("dx = g W + dh row"):
                gradients[0] = (g2 @ weight).addmm_(dh, row).view(*g.shape[:-1], row.shape[1])
        if needs_row:
            gradients[5] = dh.T @ required(x2, "x")
    return _six(gradients)


def _six(gradients: list[Tensor]) -> Gradients:
    dx, dweight, dbias, dcol, dcore, drow = gradients
    return dx, dweight, dbias, dcol, dcore, drow


def ride(x: Tensor, adapter: Riding) -> tuple[Tensor, Tensor]:
    """The changed input x' (T, in) of x (T, in), and h (T, r). The change is added in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with stage("h = x row^T"):
        h = x @ adapter.own_row.T
    with stage("x' = x, x'[:, J] += h U^T"):
        changed = x.clone(memory_format=torch.contiguous_format)
        chosen = x.index_select(1, adapter.columns).to(wide)
        changed.index_copy_(1, adapter.columns, chosen.addmm_(h.to(wide), adapter.mixing.to(wide).T).to(x.dtype))
    return changed, h


def ride_back(
    g: Tensor, x: Tensor | None, h: Tensor | None, adapter: Riding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of core and row; g, the gradient of x', becomes that of x in place where it is needed."""
    needs_x, needs_core, needs_row = needs
    dcore, drow = adapter.core.new_empty(0), g.new_empty(0)
    wide = torch.promote_types(g.dtype, torch.float32)
    at = adapter.slice_index
    with stage("p = d[:, J]"):
        p = g.index_select(1, adapter.columns).to(wide)
    if needs_core:
        with stage("dcore = p^T h"):
            own = (p.T @ required(h, "h").to(wide)) * (adapter.gain.to(wide) * adapter.scale).unsqueeze(1)
            dcore = torch.zeros_like(adapter.core, memory_format=torch.contiguous_format)
            dcore[at] = own
    if needs_x or needs_row:
        with stage("dx = d + p U R"):
            dh = (p @ adapter.mixing.to(wide)).to(g.dtype)
            if needs_row:
                drow = torch.zeros_like(adapter.row, memory_format=torch.contiguous_format)
                adapter._replace(row=drow).own_row.copy_(dh.T @ required(x, "x"))
            if needs_x:
                g.addmm_(dh, adapter.own_row)
    return dcore, drow


EAGER = Backend(
    name="eager",
    description=lambda: "PyTorch operations",
    missing=lambda device_type: "",
    forward=forward,
    backward=backward,
    ride=ride,
    ride_back=ride_back,
)
