"""The native backend's part for a GPU, on the CPU: csrc/native.cpp, csrc/cuda/*.cpp and the kernels' launches.

They are compiled against a CUDA runtime for the CPU (tests/cpp/stubs) as torch.ops.tcurlora_on_cpu. The wide products
are the CPU's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends import eager

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ALL = [True] * 6
NAMES = ("y", "x", "weight", "bias", "col", "core", "row")


@pytest.fixture(scope="session")
def backend() -> str:
    """Cases are built once, not for every backend."""
    return "eager"


@pytest.fixture(scope="module")
def operators(compiler: str, stubs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch.ops.tcurlora_on_cpu: forward and backward, with the arguments of eager's."""
    folder = tmp_path_factory.mktemp("on_cpu")
    sources = [ROOT / "tests" / "cpp" / "stubs" / "operators.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]

    def compile(source: Path) -> Path:
        # torch 2.6 to 2.14 ask for C++17 or C++20: the newer suits all.
        options = ["-std=c++20", "-O1", "-fPIC", "-DTCURLORA_CUDA", *stubs]
        to = folder / f"{source.stem}.o"
        done = subprocess.run(
            [compiler, *options, "-x", "c++", "-c", str(source), "-o", str(to)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    library = folder / "libtcurlora_on_cpu.so"
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library), *torch_libraries]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return torch.ops.tcurlora_on_cpu


def results(forward: Callable[..., Any], backward: Callable[..., Any], case: Any, g: Tensor) -> dict[str, Tensor]:
    y, h = forward(case.x, case.weight, case.bias, case)
    return dict(zip(NAMES, (y, *backward(g, case.x, h, case.weight, case)), strict=True))


def by_cuda_path(operators: Any, case: Any, g: Tensor) -> dict[str, Tensor]:
    def backward(g: Tensor, x: Tensor, h: Tensor, weight: Tensor, case: Any) -> Any:
        *factors, transform = case.factors
        return operators.backward(g, x, h, weight, *factors, ALL, transform)

    return results(lambda *tensors: operators.forward(*tensors[:-1], *tensors[-1].factors), backward, case, g)


def by_eager(case: Any, g: Tensor) -> dict[str, Tensor]:
    return results(
        lambda *tensors: eager.forward(*tensors[:-1], tensors[-1].factors),
        lambda *tensors: eager.backward(*tensors[:-1], tensors[-1].factors, ALL),
        case, g,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize(
    ("S", "c", "r", "n", "T"), [(48, 8, 8, 3, 130), (12, 12, 8, 1, 70), (7, 3, 5, 2, 1), (6, 6, 6, 3, 0)]
)
def test_forward_and_every_gradient_are_eagers(
    operators: Any, make_case: Callable[..., Any], S: int, c: int, r: int, n: int, T: int, transform: str, bias: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """float64 to rounding; of a shorter dtype, errors against float64 on the same inputs as in test_accuracy.py."""
    case = make_case(S, 24, 20, c, r, S - n, n, (T,), bias, 0.1, transform=transform)
    case = case.to(dtype, torch.promote_types(dtype, torch.float32))
    g = torch.randn(T, n * 24).to(dtype)
    right = by_eager(case.to(torch.float64, torch.float64), g.double())
    found, theirs = by_cuda_path(operators, case, g), by_eager(case, g)
    for name, expected in right.items():
        assert found[name].dtype == theirs[name].dtype
        assert found[name].shape == expected.shape
        errors = [float((one[name].double() - expected).norm()) for one in (found, theirs)]
        slack = (1e-13 if dtype == torch.float64 else torch.finfo(found[name].dtype).eps) * float(expected.norm())
        assert errors[0] <= 2 * errors[1] + slack, f"{name}: {errors}"


RIDING = ("x'", "dx", "dcore", "drow")


def riding_by_cuda_path(operators: Any, x: Tensor, g: Tensor, adapter: Riding) -> tuple[Tensor, ...]:
    """As csrc/riding/operators.cpp around the two functions."""
    h = x @ adapter.own_row.T
    changed = operators.changed_input(x, h, *adapter)
    dh, dcore = operators.changed_input_back(g, h, *adapter, True)
    drow = torch.zeros_like(adapter.row)
    adapter._replace(row=drow).own_row.copy_(dh.T @ x)
    return changed, torch.addmm(g, dh, adapter.own_row), dcore, drow


def riding_by_eager(x: Tensor, g: Tensor, adapter: Riding) -> tuple[Tensor, ...]:
    changed, h = eager.ride(x, adapter)
    dx = g.clone()
    return changed, dx, *eager.ride_back(dx, x, h, adapter, [True] * 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("S", "c", "r", "features", "T"),
    [(1, 8, 8, 64, 130), (3, 3, 5, 33, 70), (2, 40, 24, 48, 9), (1, 1, 1, 7, 1), (2, 4, 4, 16, 0)],
)
def test_the_riding_form_is_eagers(
    operators: Any, S: int, c: int, r: int, features: int, T: int, core: torch.dtype, dtype: torch.dtype
) -> None:
    """Also of rows that lie apart, and an adapter that is not contiguous; bounds as above."""
    f64 = torch.float64
    adapter = Riding(
        torch.randperm(features)[:c].repeat_interleave(2)[::2],
        torch.randn(S, r, c, dtype=f64).to(core).transpose(1, 2),
        torch.randn(S * r, features, dtype=f64).to(dtype) / features**0.5, (torch.rand(c, dtype=f64) + 0.5).to(core),
        S - 1, 0.3,
    )  # fmt: skip
    x, g = (torch.randn(T, features + 5, dtype=f64).to(dtype)[:, :features] for _ in range(2))
    exact = adapter._replace(**{name: getattr(adapter, name).double() for name in ("core", "row", "gain")})
    right = riding_by_eager(x.double(), g.double(), exact)
    found, theirs = riding_by_cuda_path(operators, x, g, adapter), riding_by_eager(x, g, adapter)
    for name, one, other, expected in zip(RIDING, found, theirs, right, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, expected.shape)
        errors = [float((result.double() - expected).norm()) for result in (one, other)]
        slack = (1e-13 if one.dtype == f64 else torch.finfo(one.dtype).eps) * float(expected.norm())
        assert errors[0] <= 2 * errors[1] + slack, f"{name}: {errors}"
    columns, core_alone = torch.arange(c), g.index_select(1, adapter.columns)
    h = x @ adapter.own_row.T
    for needs_h in (True, False):  # p alone, as where x needs no gradient
        dh, dcore = operators.changed_input_back(core_alone, h, columns, *adapter[1:], needs_h)
        assert torch.equal(dcore, found[2])
        assert dh.numel() == (T * r if needs_h else 0)


def test_the_riding_form_refuses_more_columns_than_fit(operators: Any) -> None:
    adapter = Riding(torch.arange(12289), torch.ones(1, 12289, 1), torch.ones(1, 12289), torch.ones(12289), 0, 1.0)
    with pytest.raises(RuntimeError, match="CUDA"):
        operators.changed_input_back(torch.ones(1, 12289), None, *adapter, True)


class Products(TorchDispatchMode):
    """The operations that write or return a tensor of a given number of elements, with the shapes of their inputs."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.elements and not func.is_view:
            inputs = [argument for argument in args if isinstance(argument, Tensor)]
            self.seen.append((func.overloadpacket.__name__, *(tuple(one.shape) for one in inputs[-2:])))
            if func.overloadpacket.__name__ == "addmm":
                assert inputs[0].dim() == 1, "cuBLAS adds a vector in its epilogue and copies any other bias first"
        return result


T, OUT, IN, WIDTH = 11, 24, 20, 48  # c*S = r*S = 48
FROM_X, FROM_M = ((T, IN), (IN, OUT)), ((T, WIDTH), (WIDTH, OUT))
FROM_X_OF_3, FROM_M_OF_3 = ((T, IN), (IN, 3 * OUT)), ((3 * T, WIDTH), (WIDTH, OUT))


@pytest.mark.parametrize(
    ("n", "bias", "expected"),
    [
        (1, True, [("addmm", *FROM_M), ("addmm_", *FROM_X)]),
        (1, False, [("mm", *FROM_M), ("addmm_", *FROM_X)]),
        (3, False, [("mm", *FROM_M_OF_3), ("addmm_", *FROM_X_OF_3)]),
        (3, True, [("addmm", *FROM_X_OF_3), ("addmm_", *FROM_M_OF_3)]),  # an epilogue has one bias for all rows
    ],
)
def test_the_products_pass_over_y_and_dx_three_times_in_this_order(
    operators: Any, make_case: Callable[..., Any], n: int, bias: bool, expected: list[Any]
) -> None:
    """The first product writes y, the second reads and writes it; nothing copies a bias into it before."""
    case = make_case(12, OUT, IN, 4, 4, 0, n, (T,), bias)
    with Products(T * n * OUT) as forward:
        _, h = operators.forward(case.x, case.weight, case.bias, *case.factors)
    assert forward.seen == expected
    *factors, transform = case.factors
    needs = [True, False, False, False, True, False]
    with Products(T * IN) as backward:
        operators.backward(torch.randn(T, n * OUT).double(), None, h, case.weight, *factors, needs, transform)
    dh, g = ((T, WIDTH), (WIDTH, IN)), ((T, n * OUT), (n * OUT, IN))
    assert backward.seen == [("mm", *dh), ("addmm_", *g)]
