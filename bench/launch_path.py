"""The host's time for the Triton backend's launches, without a GPU: ``python -m tcurlora_ext.bench.launch_path``.

Triton compiles the kernels for a GPU of compute capability 9.0 and its launches end in a driver that does nothing. What
is left is Python: checks, allocations, arguments, Triton's look-up of the kernel. On a GPU the driver's own time comes
on top, some microseconds per kernel.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import typer
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tcurlora_ext.io.table import text_table
from tcurlora_ext.kernels import operator
from tcurlora_ext.kernels.plans import Device, forget_plans
from tcurlora_ext.kernels.riding import operator as riding
from tcurlora_ext.maths.contract import Factors

from .entry import run_command

HOPPER = Device("NVIDIA H200", 132, True)
CORE_ALONE = (True, False, False, False, True, False)


class Sizes(NamedTuple):
    """A layer of ``slices`` slices of (out, in) of a stack of S, with T tokens and a core of rank r."""

    name: str
    tokens: int
    in_features: int
    out: int
    slices: int
    stack: int
    rank: int


# Small weights: only shapes and strides matter. Three launches (project, expand, core gradient), and one that is fused.
LAYERS = (Sizes("unetr qkv", 256, 768, 768, 3, 48, 8), Sizes("one launch", 256, 768, 768, 1, 12, 8))


class NoDriver:
    """A driver of Triton whose launches do nothing but count: ``launched`` has the grid and arguments of the last."""

    def __init__(self) -> None:
        self.utils = self
        self.launches = 0
        self.launched: tuple[Any, ...] = ()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": HOPPER.multiprocessors}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1
        self.launched = arguments


DRIVER = NoDriver()  # one for the process: Triton's compiled kernels keep the driver that they were first launched by


@contextmanager
def without_gpu() -> Iterator[NoDriver]:
    """Let the Triton kernels be launched on CPU tensors, by a driver that does nothing, as for an H200."""
    forget_plans()
    with (
        patch.object(triton.runtime.driver, "_active", DRIVER),
        patch.object(operator, "device_of", lambda device: HOPPER),
        patch.object(riding, "device_of", lambda device: HOPPER),
    ):
        yield DRIVER
    forget_plans()


def operands(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Factors]:
    """x, weight, bias and the factors of a layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = sizes.stack * sizes.rank
    core = torch.randn(sizes.stack, sizes.rank, sizes.rank, generator=generator)
    factors = Factors(random(sizes.out, q), core, random(q, sizes.in_features), 0, sizes.slices, 1.0)
    width = sizes.slices * sizes.out
    return random(sizes.tokens, sizes.in_features), random(width, sizes.in_features), random(width), factors


def launch_times(calls: int = 300, rounds: int = 7) -> list[dict[str, Any]]:
    """A row per layer and pass: its launches, and the median and least time of a call in us, on one thread."""
    rows = []
    with without_gpu() as driver:
        for sizes in LAYERS:
            x, weight, bias, factors = operands(sizes)
            y, h = operator.forward(x, weight, bias, factors)
            passes = {
                "forward": lambda x=x, w=weight, b=bias, f=factors: operator.forward(x, w, b, f),
                "backward": lambda y=y, h=h, w=weight, f=factors: operator.backward(y, None, h, w, f, CORE_ALONE),
            }
            for name, call in passes.items():
                call()
                driver.launches = 0
                call()
                taken = []
                launches = driver.launches
                for _ in range(rounds):
                    start = time.perf_counter()
                    for _ in range(calls):
                        call()
                    taken.append(1e6 * (time.perf_counter() - start) / calls)
                rows.append({
                    "layer": sizes.name, "pass": name, "launches": launches,
                    "median_us": f"{statistics.median(taken):.1f}", "least_us": f"{min(taken):.1f}",
                })  # fmt: skip
    return rows


def main() -> None:
    """Measure the host's time for the launches of the Triton backend, on CPU tensors and without a GPU."""
    torch.set_num_threads(1)
    rows = launch_times()
    typer.echo(text_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows], left=(0, 1)))


if __name__ == "__main__":
    sys.exit(run_command(main, None, "tcurlora_ext.bench.launch_path"))
