"""Shared by all tests: reproducible random numbers, golden vectors, hypothesis settings."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.utils import cpp_extension

# No deadline: the first call of an operator is slow, and a shared machine is slower. Derandomised: a failure on one
# machine is the same failure on the next.
settings.register_profile(
    "tcurlora", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tcurlora")

# The tensors of these tests are small: threads would wait for each other more than they work. Processes that a test
# starts have as many as it has: on some CPUs (AMD EPYC) a product's last bit depends on how many there are.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Where the operator's tests compute: `make gpu` sets it to "cuda". Tensors are then made there by default.
DEVICE = torch.device(os.environ.get("TCURLORA_TEST_DEVICE", "cpu"))
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)

GOLDEN = sorted((Path(__file__).parent / "data").glob("*.npz"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C: tests that were started in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """One file of golden vectors: float64 tensors made from the definition, independently of this package.

    W (S, out, in), rows, columns, C, R, U0, U, delta, cur_reconstruction; per slice x (S, T, in), g, and y (the
    adapter's part alone), dx, dU.
    """
    with numpy.load(request.param) as file:
        return {name: torch.from_numpy(file[name]).to(DEVICE) for name in file.files}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operator's tests compute."""
    return DEVICE


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Tensor, Tensor], None]:
    """Equality bit for bit, dtype and shape included."""

    def check(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    return check


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler on the PATH")
    return found


@pytest.fixture(scope="session")
def stubs() -> list[str]:
    """Compiler options for a CUDA runtime of the CPU, tests/cpp/stubs, and for torch, which has its 16-bit types."""
    folders = [option for folder in cpp_extension.include_paths() for option in ("-isystem", folder)]
    return ["-I", str(Path(__file__).parent / "cpp" / "stubs"), *folders]
