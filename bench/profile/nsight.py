"""Nsight Compute and Nsight Systems: where they are, how a step is run under them, and what their CSV says.

The step runs in a process of its own, between cudaProfilerStart and cudaProfilerStop, after its warm-up. Stages are
NVTX push/pop ranges of the domain "tcurlora" (tcurlora_ext.trace); both tools put a kernel into the range in which the
host launched it, on the thread that did. No GPU has run it yet.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tcurlora_ext.trace import DOMAIN

from .measured import OUTSIDE, Work
from .stages import is_stage

READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
RANGES = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
# Of both tools' unit rows and column titles.
UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 0.01,
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
}  # fmt: skip
FOLDERS = {"ncu": "nsight-compute", "nsys": "nsight-systems"}


class ToolError(RuntimeError):
    """A profiler that is there and gave no profile; the message says why."""


def find(tool: str) -> str | None:
    """The path of ``ncu`` or ``nsys``: on the PATH, in CUDA_HOME/bin, or where NVIDIA's packages put it."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    # The newest version last by name; nsys lies in bin, ncu beside it.
    installed = sorted(Path("/opt/nvidia", FOLDERS[tool]).glob("*"), reverse=True)
    places += [place for folder in installed for place in (folder, folder / "bin")]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, places)))


def profile(tool: str, path: str, command: Sequence[str]) -> list[Work]:
    """What the tool at ``path`` sees of ``command``. ToolError where it, or the command, fails or sees no kernel."""
    with tempfile.TemporaryDirectory() as folder:
        works = _ncu(path, command, Path(folder)) if tool == "ncu" else _nsys(path, command, Path(folder))
    if not works:
        raise ToolError("it saw no kernel between cudaProfilerStart and cudaProfilerStop")
    return works


def _ncu(path: str, command: Sequence[str], folder: Path) -> list[Work]:
    log = folder / "ncu.csv"
    metrics = ",".join((READ, WRITTEN, TIME, TENSOR))
    run(
        [path, "--profile-from-start", "off", "--clock-control", "none", "--nvtx", "--csv", "--page", "raw",
         "--print-units", "base", "--metrics", metrics, "--log-file", str(log), *command], log
    )  # fmt: skip
    return ncu_work(log.read_text())


def _nsys(path: str, command: Sequence[str], folder: Path) -> list[Work]:
    report = folder / "step.nsys-rep"
    run(
        [path, "profile", "--trace", "cuda,nvtx", "--sample", "none", "--cpuctxsw", "none",
         "--capture-range", "cudaProfilerApi", "--capture-range-end", "stop", "--force-overwrite", "true",
         "--output", str(report), *command]
    )  # fmt: skip
    texts = [
        run(
            [path, "stats", "--force-export", "true", "--report", name, "--format", "csv", "--output", "-", str(report)]
        )
        for name in ("nvtx_kern_sum", "cuda_gpu_kern_sum")
    ]
    return nsys_work(*texts)


def run(command: Sequence[str], log: Path | None = None) -> str:
    """The command's stdout. ToolError with the last line that it or its log says where its exit code is not 0."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout, done.stderr, log.read_text() if log is not None and log.exists() else ""))
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise ToolError(f"exit code {done.returncode}: {(errors or lines or ['it said nothing'])[-1]}")
    return done.stdout


def ncu_work(text: str) -> list[Work]:
    """Kernels of ``ncu --nvtx --csv --page raw``: a header, a row of units, a row a kernel; other lines are skipped."""
    table = _table(text, "ID")
    if len(table) < 3:
        return []
    header, units, *rows = table
    for name in (TIME, RANGES):
        if name not in header:
            raise ToolError(f"its CSV has no column {name!r}, found {', '.join(header)}")
    unit = dict(zip(header, units, strict=False))
    works = []
    for row in rows:
        cell = dict(zip(header, row, strict=False))
        value = {name: _number(cell.get(name, ""), unit.get(name, "")) for name in (READ, WRITTEN, TIME, TENSOR)}
        stage = ncu_stage(cell[RANGES])
        works.append(Work(stage, value[TIME] or 0.0, 1, value[READ], value[WRITTEN], value[TENSOR]))
    return works


def ncu_stage(cell: str) -> str:
    """The innermost stage of a kernel's ranges: each is ``"domain:name:..."`` in quotes, the outermost first."""
    found = [name for name in re.findall(rf'"{DOMAIN}:([^:"]+)', cell) if is_stage(name)]
    return found[-1] if found else OUTSIDE


def nsys_work(ranges: str, kernels: str) -> list[Work]:
    """Stages from the report ``nvtx_kern_sum``, and what is outside of them from the total of ``cuda_gpu_kern_sum``."""
    works = []
    for row in _named(ranges, "NVTX Range"):
        domain, _, name = row["NVTX Range"].partition(":")
        if domain == DOMAIN and is_stage(name):
            works.append(Work(name, _total_time(row), round(_number(row["Kern Inst"], "") or 0)))
    totals = [(_total_time(row), round(_number(row["Instances"], "") or 0)) for row in _named(kernels, "Time (%)")]
    seconds = sum(time for time, _ in totals) - sum(work.seconds for work in works)
    launches = sum(number for _, number in totals) - sum(work.launches for work in works)
    return [*works, Work(OUTSIDE, max(seconds, 0.0), launches)] if totals else []


def _total_time(row: dict[str, str]) -> float:
    """Seconds; the unit stands in the column's title, "Total Time (ns)"."""
    title = next(title for title in row if title.startswith("Total Time ("))
    return _number(row[title], title.removeprefix("Total Time (").rstrip(")")) or 0.0


def _named(text: str, first: str) -> list[dict[str, str]]:
    header, *rows = _table(text, first) or [[]]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _table(text: str, first: str) -> list[list[str]]:
    """The rows of the CSV in a tool's output, from the header that begins with ``first`` to the next empty line."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.replace('"', "").startswith(f"{first},")), None)
    if start is None:
        return []
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [row for row in csv.reader(lines[start:end]) if not row[0].startswith("==")]


def _number(text: str, unit: str) -> float | None:
    """A number in base units, a percentage as a share; None for an empty cell or "n/a"."""
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:
        return None
