"""The device that is measured: its name, timing on it, its ceilings, and the columns that every row of results has."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcurlora_ext.io.versions import version_of

REPOSITORY = Path(__file__).resolve().parents[1]
WRITTEN = (":!bench/results", ":!docs", ":!README.md")  # by measurements, plots and tables
PACKAGES = ("tcurlora_ext", "torch", "triton", "peft", "transformers", "monai")


def choose_device(name: str) -> torch.device:
    """The device by a name such as "cpu" or "cuda:1". ValueError where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is '{name}', expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is '{name}', expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is '{name}', but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def folder_name(name: str) -> str:
    """A name as a folder or file name: lower case, with hyphens for spaces."""
    return name.replace(",", "").replace("(R)", "").replace("(TM)", "").replace(" ", "-").lower()


def provenance(device: torch.device) -> dict[str, str]:
    """The columns device, versions and commit."""
    found = {"device": device_name(device)} | {package: version_of(package) for package in PACKAGES}
    return found | {"commit": _commit()}


def _commit() -> str:
    """The commit that is checked out, with "-dirty" where a file other than results and docs differs from it."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *WRITTEN], check=False).returncode
    return head.stdout.strip() + ("-dirty" if changed else "")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds until the device had finished some steps, and seconds until the host had queued them."""
    synchronize(device)
    start = time.perf_counter()
    steps()
    queued = time.perf_counter() - start
    synchronize(device)
    return time.perf_counter() - start, queued


def repeat(call: Callable[[], Any], times: int) -> None:
    """Call a function several times."""
    for _ in range(times):
        call()


@dataclass(frozen=True)
class Ceilings:
    """The device's peaks, as in a roofline model: FLOP/s of a large product, bytes/s of a large copy, both ways."""

    flops: float
    bytes: float

    def limit(self, flops: float, moved: float) -> float:
        """The least time in seconds for so many FLOPs and bytes."""
        return max(flops / self.flops, moved / self.bytes)


def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Measure them: a product of two 8192 x 8192 matrices and a copy of 1 GiB; on a CPU 4096 x 4096 and 256 MiB."""
    side, size = (8192, 2**30) if device.type == "cuda" else (4096, 2**28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        2 * side**3 / _least(lambda: torch.mm(a, b, out=product), device),
        2 * size / _least(lambda: target.copy_(source), device),
    )


def _least(call: Callable[[], Any], device: torch.device) -> float:
    """The least time of a call in seconds, tried until four tries in a row were not 1 % faster: the first are slow."""
    call()
    least, since = float("inf"), 0
    while since < 4:
        taken = timed(call, device)[0]
        since = 0 if taken < 0.99 * least else since + 1
        least = min(least, taken)
    return least
