"""What the launches of every kernel are planned by: devices, layouts of tensors, and the plans that are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which launches depend; ``descriptors``: it has a tensor copy engine."""

    name: str
    multiprocessors: int
    descriptors: bool


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The GPU of a tensor; for the CPU a small device that stands for Triton's interpreter."""
    if device.type != "cuda":
        return Device("Triton's interpreter", 3, True)
    properties = torch.cuda.get_device_properties(device)
    copies = properties.major >= 9 and torch.version.hip is None
    return Device(properties.name, properties.multi_processor_count, copies)


def precision() -> str:
    """The precision of float32 products by PyTorch's setting for CUDA: "tf32" or "ieee" (full float32)."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; allow_tf32 raises once the new setting has been used
        setting = matmul.fp32_precision
        if setting == "none":
            setting = getattr(torch.backends, "fp32_precision", "none")
        return "tf32" if setting == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def rows_of(tensor: Tensor) -> Tensor:
    """Reshape (..., width) to (T, width), copying where a row is not contiguous."""
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a launch depends on: shape, strides, and whether the address is a multiple of 16 bytes."""
    return tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype of x that the kernels do not compute in."""
    if dtype not in DTYPES:
        names = ", ".join(str(one) for one in DTYPES)
        raise ValueError(f"x is {dtype}, the Triton kernels compute in {names}; use backend='eager'")


# Plans by the call's key. A model needs some for each different layer and number of tokens; a loop over ever new
# numbers of tokens would fill the memory, so all are dropped at this number and made again, for some 100 us each.
MOST_PLANS = 16384
_PLANS: dict[tuple[Any, ...], Any] = {}
P = TypeVar("P")


def forget_plans() -> None:
    """Drop all plans, for a caller that changes what they were made from: the tables of tiles, or Triton's driver."""
    _PLANS.clear()


def planned(key: tuple[Any, ...], make: Callable[[], P]) -> P:
    """The plan of this key, which ``make`` makes where there is none."""
    found = _PLANS.get(key)
    if found is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        found = _PLANS[key] = make()
    return found
