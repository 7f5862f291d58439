"""The arguments of one call of the operator, together with the unfolded factors."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcurlora_ext.maths import folding, reference
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.operator.backends import missing

# tests/conftest.py sets it where these tests are for a GPU.
DEVICE = torch.get_default_device()
# The Triton kernels where they work: on a GPU, or with TRITON_INTERPRET=1 in the interpreter.
BACKENDS = ["eager", "native"] + (["triton"] if not missing("triton", DEVICE.type) else [])


@dataclass(frozen=True)
class Case:
    """C (S, out, c), U (S, c, r) and R (S, r, in) in float64; the other fields are the operator's arguments."""

    C: Tensor
    U: Tensor
    R: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    col: Tensor
    core: Tensor
    row: Tensor
    first_slice: int
    num_slices: int
    scale: float
    transform: str = "dft"
    backend: str = "auto"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of ``torch.ops.tcurlora.linear``."""
        return (*self.tensors, self.first_slice, self.num_slices, self.scale, self.transform, self.backend)

    @property
    def factors(self) -> Factors:
        return Factors(*self.arguments[3:-1])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.col, self.core, self.row

    def replaced(self, **values: Any) -> Case:
        return replace(self, **values)

    def to(self, dtype: torch.dtype, core: torch.dtype = torch.float32) -> Case:
        """The case with tensors cast to a dtype, as in a model of that dtype."""
        names = ("x", "weight", "bias", "col", "row")
        cast = {name: None if (t := getattr(self, name)) is None else t.to(dtype) for name in names}
        return replace(self, core=self.core.to(core), **cast)

    def training(self, *names: str) -> Case:
        """The case with these tensors as leaves that require a gradient."""
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names})

    def reference(self) -> Tensor:
        """The result by the dense definition in float64, from the unfolded factors."""
        if self.transform == "dft":
            delta = reference.delta_weights(self.C, self.U, self.R, self.scale)
        else:
            left = folding.slice_product(self.C, self.U, self.transform)
            delta = self.scale * folding.slice_product(left, self.R, self.transform)
        own = delta[self.first_slice : self.first_slice + self.num_slices].flatten(0, 1)
        bias = None if self.bias is None else self.bias.double()
        return torch.nn.functional.linear(self.x.double(), self.weight.double() + own, bias)


def build(
    S: int = 5,
    out: int = 6,
    in_: int = 7,
    c: int = 3,
    r: int = 2,
    first: int = 0,
    n: int = 1,
    leading: tuple[int, ...] = (4,),
    bias: bool = True,
    scale: float = 0.7,
    transform: str = "dft",
    seed: int = 0,
    backend: str = "auto",
) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    C, U, R = random(S, out, c), random(S, c, r), random(S, r, in_)
    return Case(
        C, U, R, random(*leading, in_), random(n * out, in_), random(n * out) if bias else None,
        folding.fold_columns(C, transform), folding.fold_core(U, transform), folding.fold_rows(R, transform),
        first, n, scale, transform, backend,
    )  # fmt: skip


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that works on this machine computes every case."""
    reason = missing(request.param, DEVICE.type)
    if reason:
        pytest.skip(reason)
    return request.param


class LargestNew(TorchDispatchMode):
    """Records the size of the largest tensor created within this context, views not counted."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.kept: list[Any] = []  # or the memory, and with it the address, would be used again
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.kept.append(tensor)
                self.known.add(tensor.untyped_storage().data_ptr())
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.fixture(scope="session")
def largest_new() -> type[LargestNew]:
    return LargestNew


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip cases in float64 for the Triton kernels, which refuse them."""
    try:
        return (yield)
    except Exception as error:  # opcheck wraps it
        if "the Triton kernels compute in" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def make_case(backend: str) -> Callable[..., Case]:
    return partial(build, backend=backend)
