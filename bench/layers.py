"""One layer's training step (forward and backward) beside the frozen layer and plain LoRA of the same width.

    python -m tcurlora_ext.bench.layers [--rounds 20] [--dtype float32] [--device cpu] [--output bench/results]

Every variant is first checked against float64. Rounds interleave the variants, so that a ratio compares runs that
stand side by side. ``extra`` is the time over the frozen layer's. Writes layers.csv and host.csv for this device.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.bench.cases import TINY, UNETR, Layer
from tcurlora_ext.bench.variants import Forward, Inputs, check, tcur_call, trained, variants
from tcurlora_ext.segmentation.artifacts import write_csv


def device_name(device: torch.device) -> str:
    """The processor's or GPU's name, with the threads in use of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def provenance() -> dict[str, str]:
    """Versions and commit, for every row."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "torch": version("torch"), "tcurlora_ext": version("tcurlora_ext"), "commit": commit.stdout.strip() or "unknown"
    }  # fmt: skip


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def training_step(forward: Forward, inputs: Inputs, wanted: list[Tensor]) -> None:
    """Forward, and the gradients of what is wanted."""
    torch.autograd.grad(forward(inputs), wanted, inputs.g)


def repeat(call: Callable[[], Tensor], calls: int) -> None:
    """So many calls."""
    for _ in range(calls):
        call()


def measure(layer: Layer, dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row a variant: median, p20 and p80 in ms, and the median over rounds of what it takes over frozen and LoRA."""
    inputs = Inputs.random(layer, dtype, device)
    steps = {}
    for name, forward in variants(device).items():
        check(name, forward, inputs)
        steps[name] = partial(training_step, forward, inputs, trained(name, inputs))
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1e3 * seconds(step, device))
    floor, wide = times["frozen"], times["lora"]
    rows = []
    for name, taken in times.items():
        fifths = statistics.quantiles(taken, n=5)
        over_lora = statistics.median((t - f) / (w - f) for t, f, w in zip(taken, floor, wide, strict=True))
        rows.append(
            {
                "case": layer.name, "tokens": layer.tokens, "width": layer.width, "dtype": str(dtype)[6:],
                "variant": name, "median_ms": f"{statistics.median(taken):.2f}", "p20_ms": f"{fifths[0]:.2f}",
                "p80_ms": f"{fifths[3]:.2f}",
                "over_frozen": f"{statistics.median(t / f for t, f in zip(taken, floor, strict=True)):.3f}",
                "extra_over_lora": "" if name == "frozen" else f"{over_lora:.3f}",
            }
        )  # fmt: skip
    return rows


def host_times(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time of one forward call on tiny inputs whose tensors ask for gradients, in us: what the host does for a call.

    Of tCUR the registered operator, of the others what a module calls.
    """
    inputs = Inputs.random(TINY, torch.float32, device)
    forwards = {
        name: tcur_call(name.split()[1], inputs) if name.startswith("tcur") else partial(forward, inputs)
        for name, forward in variants(device).items()
    }
    calls, rows = 500, []
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            taken[name].append(1e6 / calls * seconds(partial(repeat, forward, calls), device))
    for name, times in taken.items():
        rows.append({"variant": name, "median_us": f"{statistics.median(times):.1f}", "least_us": f"{min(times):.1f}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    about = {"device": device_name(device)} | provenance()
    rows = []
    for layer in UNETR:
        rows += measure(layer, dtype, device, arguments.rounds)
        for row in rows[-len(variants(device)) :]:
            print("  ".join(f"{value:>14}" for value in row.values()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    host = host_times(device, arguments.rounds)
    torch.set_num_threads(threads)
    for row in host:
        print("host time  " + "  ".join(f"{value:>14}" for value in row.values()))
    folder = arguments.output / about["device"].replace(",", "").replace(" ", "-").replace("(R)", "").lower()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"layers-{arguments.dtype}.csv", [about | row for row in rows])
    write_csv(folder / "host.csv", [about | row for row in host])


if __name__ == "__main__":
    main()
