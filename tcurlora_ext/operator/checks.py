"""The checks of the operator's arguments, before anything is computed, for all backends."""

from __future__ import annotations

from torch import Tensor

from tcurlora_ext.maths.contract import Factors


def check(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> None:
    """Raise ValueError where shapes, dtypes, devices or slices do not fit together."""
    col, core, row, _, n, *_ = factors
    if weight.dim() != 2 or col.dim() != 2 or row.dim() != 2 or core.dim() != 3:
        raise ValueError(
            f"weight {tuple(weight.shape)}, col {tuple(col.shape)}, row {tuple(row.shape)} and core "
            f"{tuple(core.shape)}: expected two dimensions each and three for the core"
        )
    for name, data in (("x", x), ("core", core)):
        if not data.is_floating_point():
            raise ValueError(f"{name} is {data.dtype}, expected a floating dtype")
    slices, c, r = core.shape
    out_features, in_features = col.shape[0], row.shape[1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x", x, (*x.shape[:-1], in_features)),
        ("weight", weight, (n * out_features, in_features)),
        ("bias", bias, (n * out_features,)),
        ("col", col, (out_features, c * slices)),
        ("row", row, (r * slices, in_features)),
        ("core", core, tuple(core.shape)),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for core {tuple(core.shape)}, "
                f"{n} slice(s) of {out_features} x {in_features}"
            )
        if tensor.dtype != x.dtype and tensor is not core:
            raise ValueError(f"{name} is {tensor.dtype}, expected {x.dtype} as x")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} as x")
    check_slices(factors)


def check_slices(factors: Factors) -> None:
    """Raise ValueError unless the layer's slices are slices of the stack."""
    slices, first, n = factors.core.shape[0], factors.first_slice, factors.num_slices
    if n < 1 or first < 0 or first + n > slices:
        raise ValueError(f"slices {first}..{first + n - 1} asked for, the core has 0..{slices - 1}")
