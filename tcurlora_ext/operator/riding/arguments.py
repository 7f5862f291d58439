"""The flat arguments of the riding operators: schemas, conversions and checks. csrc/riding/riding.h has the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from torch import Tensor

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends.base import Backend

ADAPTER = ", ".join(f"{get_type_hints(Riding)[name].__name__} {name}" for name in Riding._fields)
OPTIONS = 'str backend="auto"'
RIDING = f"(Tensor x, Tensor weight, Tensor? bias, {ADAPTER}, {OPTIONS})"
RIDING_BACKWARD = f"(Tensor g, Tensor? x, Tensor? h, Tensor weight, {ADAPTER}, bool[4] needs, {OPTIONS})"
RIDE = f"(Tensor x, {ADAPTER}, {OPTIONS})"
RIDE_BACKWARD = f"(Tensor g, Tensor? x, Tensor? h, {ADAPTER}, bool[3] needs, {OPTIONS})"
SCHEMAS = (
    f"riding{RIDING} -> Tensor",
    f"riding_forward{RIDING} -> (Tensor y, Tensor h)",
    f"riding_backward{RIDING_BACKWARD} -> (Tensor dx, Tensor dbias, Tensor dcore, Tensor drow)",
    f"ride{RIDE} -> Tensor",
    f"ride_forward{RIDE} -> (Tensor changed, Tensor h)",
    f"ride_backward{RIDE_BACKWARD} -> (Tensor dx, Tensor dcore, Tensor drow)",
)
FIELDS = len(Riding._fields)


def backend_schemas(name: str) -> tuple[str, str]:
    """The schemas of a backend's two steps, which csrc/riding calls for backends in Python.

    ``ride_back`` changes its first argument: the gradient of x' becomes that of x.
    """
    back = f"(Tensor(a!) g, Tensor? x, Tensor? h, {ADAPTER}, bool[3] needs) -> (Tensor dcore, Tensor drow)"
    return f"{name}_ride(Tensor x, {ADAPTER}) -> (Tensor changed, Tensor h)", f"{name}_ride_back{back}"


def ride_of(backend: Backend) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function with flat arguments that calls a backend's ``ride``."""
    return lambda x, *rest: backend.ride(x, Riding(*rest))


def ride_back_of(backend: Backend) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function with flat arguments that calls a backend's ``ride_back``."""
    return lambda g, x, h, *rest: backend.ride_back(g, x, h, Riding(*rest[:-1]), rest[-1])


def split(*rest: Any) -> tuple[Riding, str]:
    """The arguments from ``columns`` on, of which the last may be missing: the adapter and the backend."""
    return Riding(*rest[:FIELDS]), *(rest[FIELDS:] or ("auto",))


def split_backward(*rest: Any) -> tuple[Riding, list[bool], str]:
    """As :func:`split`, with ``needs`` after the adapter."""
    adapter, backend = split(*rest[:FIELDS], *rest[FIELDS + 1 :])
    return adapter, rest[FIELDS], backend


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, adapter: Riding) -> None:
    """Raise ValueError where shapes, dtypes, devices or the slice do not fit together."""
    columns, core, row, gain, at, _ = adapter
    if core.dim() != 3 or row.dim() != 2 or columns.dim() != 1 or (weight is not None and weight.dim() != 2):
        raise ValueError(
            f"core {tuple(core.shape)}, row {tuple(row.shape)}, columns {tuple(columns.shape)} and weight "
            f"{None if weight is None else tuple(weight.shape)}: expected 3, 2, 1 and 2 dimensions"
        )
    for name, data in (("x", x), ("core", core)):
        if not data.is_floating_point():
            raise ValueError(f"{name} is {data.dtype}, expected a floating dtype")
    slices, c, r = core.shape
    in_features = row.shape[1]
    out = 0 if weight is None else weight.shape[0]
    expected: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("x", x, (*x.shape[:-1], in_features), "x"),
        ("weight", weight, (out, in_features), "x"),
        ("bias", bias, (out,), "x"),
        ("columns", columns, (c,), ""),
        ("core", core, (slices, c, r), ""),
        ("row", row, (r * slices, in_features), "x"),
        ("gain", gain, (c,), "core"),
    ]
    dtypes = {"x": x.dtype, "core": core.dtype}
    for name, tensor, shape, like in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for core {tuple(core.shape)}")
        if like and tensor.dtype != dtypes[like]:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtypes[like]} as {like}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} as x")
    if not 0 <= at < slices:
        raise ValueError(f"slice {at} asked for, the core has 0..{slices - 1}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight requires a gradient: the riding form is for a frozen weight, whose columns are C")
