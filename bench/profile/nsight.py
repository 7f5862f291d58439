"""Nsight Compute and Nsight Systems: finding them, running a step under them, and reading their CSV.

The step runs in a process of its own, after its warm-up, between cudaProfilerStart and cudaProfilerStop. Stages are
NVTX push/pop ranges of the domain "tcurlora" (tcurlora_ext.trace). Both tools assign a kernel to the range in which its
thread on the host launched it. This module has not run on a GPU yet.
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
# Units in the tools' unit rows and column titles -> their factor to bytes, seconds or a share.
UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 0.01,
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
}  # fmt: skip
FOLDERS = {"ncu": "nsight-compute", "nsys": "nsight-systems"}


class ToolError(RuntimeError):
    """A profiler is installed but gave no profile; the message says why."""


def find(tool: str) -> str | None:
    """The path of ``ncu`` or ``nsys`` on the PATH, in CUDA_HOME/bin or in /opt/nvidia; None where it is not found."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    # The newest version has the last name. nsys is in its folder's bin, ncu in the folder itself.
    installed = sorted(Path("/opt/nvidia", FOLDERS[tool]).glob("*"), reverse=True)
    places += [place for folder in installed for place in (folder, folder / "bin")]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, places)))


def profile(tool: str, path: str, command: Sequence[str]) -> list[Work]:
    """The work that a tool measures of a command.

    Args:
        tool: "ncu" or "nsys".
        path: Of the tool.
        command: The program to run and its arguments.

    Raises:
        ToolError: The tool or the command failed, or no kernel was seen.
    """
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
    """Run a command and return its stdout.

    Raises:
        ToolError: Its exit code is not 0. The message quotes its last error, or else its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout, done.stderr, log.read_text() if log is not None and log.exists() else ""))
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise ToolError(f"exit code {done.returncode}: {(errors or lines or ['it said nothing'])[-1]}")
    return done.stdout


def ncu_work(text: str) -> list[Work]:
    """Kernels in the output of ``ncu --nvtx --csv --page raw``: a header, a row of units, one row per kernel."""
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
    """The innermost stage among a kernel's ranges, which ncu lists from the outermost as ``"domain:name:..."``."""
    found = [name for name in re.findall(rf'"{DOMAIN}:([^:"]+)', cell) if is_stage(name)]
    return found[-1] if found else OUTSIDE


def nsys_work(ranges: str, kernels: str) -> list[Work]:
    """Work from two reports of nsys.

    Args:
        ranges: The CSV of ``nvtx_kern_sum``: kernels by stage.
        kernels: The CSV of ``cuda_gpu_kern_sum``: all kernels. Those that are in no stage are outside.
    """
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
    """The column "Total Time (<unit>)" in seconds."""
    title = next(title for title in row if title.startswith("Total Time ("))
    return _number(row[title], title.removeprefix("Total Time (").rstrip(")")) or 0.0


def _named(text: str, first: str) -> list[dict[str, str]]:
    header, *rows = _table(text, first) or [[]]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _table(text: str, first: str) -> list[list[str]]:
    """The rows of the CSV in a tool's output, from the header with this first column to the next empty line."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.replace('"', "").startswith(f"{first},")), None)
    if start is None:
        return []
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [row for row in csv.reader(lines[start:end]) if not row[0].startswith("==")]


def _number(text: str, unit: str) -> float | None:
    """A cell in bytes or seconds, a percentage as a share; None for an empty cell or "n/a"."""
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:
        return None
