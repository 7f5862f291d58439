"""One step of a case under a profiler: what each stage took, and the least it can take by count.

    python -m tcurlora_ext.bench.profile "unetr qkv" --variant "tcur native"

writes profile-<case>-<variant>.csv and .png into a folder named after the device. Nsight Compute measures the device
memory's traffic and the use of the tensor cores. Where it does not work, Nsight Systems times the kernels; where that
does not either, and on a CPU, torch.profiler times the stages. docs/profiling.md explains the columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from tcurlora_ext.io.records import write_csv
from tcurlora_ext.io.table import text_table

from ..cases import DTYPES, MODES, Case, every
from ..counts import fewest_bytes, flops
from ..devices import Ceilings, ceilings, choose_device, device_name, folder_name, provenance, synchronize
from ..entry import run_command
from ..memory import forward_pass
from ..networks import build
from ..run import Row, case_columns, number
from ..variants import Problem, prepare, variants
from . import annotated, nsight
from .figure import draw
from .measured import OUTSIDE, TOTAL, Work, by_stage
from .stages import Count, count, layer_calls

WARM_UP = 3
FALLBACK = "torch.profiler"


def choose_case(name: str, **overrides: object) -> Case:
    """The first case of this name with some fields replaced.

    Args:
        name: Of a case in any of the sets.
        overrides: rank, tokens, dtype and mode; None leaves the case's own.

    Raises:
        ValueError: There is no such case, or a field has no such value; the message lists what there is.
    """
    names = list(dict.fromkeys(case.name for case in every()))
    if name not in names:
        raise ValueError(f"no case is named {name!r}; expected one of: {'; '.join(names)}")
    for key in ("rank", "tokens"):
        value = overrides.get(key)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{key} is {value}, expected at least 1")
    for key, known in (("dtype", DTYPES), ("mode", MODES)):
        if overrides.get(key) not in (None, *known):
            raise ValueError(f"--{key} is {overrides[key]!r}, expected one of {', '.join(known)}")
    case = next(case for case in every() if case.name == name)
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(case, **given)  # type: ignore[arg-type]


def make_problem(case: Case, variant: str, device: torch.device) -> Problem:
    """The case adapted by a variant, after its warm-up. ValueError where this case or device has no such variant."""
    network = build(case, device)
    known = {found.name: found for found in variants(device) if found.fits(case, network)}
    if variant not in known:
        raise ValueError(f"{case.id} has no variant {variant!r} on {device}; expected one of: {'; '.join(known)}")
    problem = prepare(known[variant], case, network)
    for _ in range(WARM_UP):
        problem.step()
    synchronize(device)
    return problem


def one_step(problem: Problem, device: torch.device) -> None:
    """One step between cudaProfilerStart and cudaProfilerStop, the part of the process that Nsight profiles."""
    synchronize(device)
    torch.cuda.profiler.start()
    problem.step()
    synchronize(device)
    torch.cuda.profiler.stop()


def measure(
    problem: Problem, device: torch.device, has_stages: bool, log: Callable[[str], None]
) -> tuple[str, list[Work]]:
    """Profile a step with the first tool that works.

    Args:
        problem: The case and variant, warmed up.
        device: Where it runs.
        has_stages: Whether the variant runs through stages; a tool that then sees none of them did not work.
        log: Called with a line of text for every tool, with the reason why it was not used or its path.

    Returns:
        The tool's name and what it measured.
    """
    case = problem.case
    arguments = [
        sys.executable, "-m", "tcurlora_ext.bench.profile", case.name, "--variant", problem.variant.name,
        "--rank", str(case.rank), "--tokens", str(case.tokens), "--dtype", case.dtype, "--mode", case.mode,
        "--device", str(device), "--only-run",
    ]  # fmt: skip
    for tool in ("ncu", "nsys"):
        path = nsight.find(tool)
        if device.type != "cuda":
            log(f"{tool}: not used, {device} is no NVIDIA GPU")
        elif path is None:
            log(f"{tool}: not found on the PATH, in CUDA_HOME/bin or in /opt/nvidia/{nsight.FOLDERS[tool]}")
        else:
            try:
                works = nsight.profile(tool, path, arguments)
            except nsight.ToolError as error:
                log(f"{tool}: {path} failed: {error}")
                continue
            if not has_stages or any(work.stage != OUTSIDE for work in works):
                log(f"{tool}: {path}")
                return tool, works
            log(f"{tool}: saw no stage; those of Python need the package nvtx, those of C++ CUDA's header nvtx3")
    log(f"{FALLBACK}: {torch.__version__}")
    return FALLBACK, annotated.profile(problem, device)


def rows_of(
    problem: Problem,
    device: torch.device,
    limits: Ceilings,
    tool: str,
    works: Sequence[Work],
    counts: Mapping[str, Count],
) -> list[Row]:
    """One row per stage, then one for what is outside of all stages, then one for the whole step."""
    measured = by_stage(works)
    stages = list(dict.fromkeys([*counts, *(name for name in measured if name not in (OUTSIDE, TOTAL))]))
    work = flops(problem)
    counted: dict[str, tuple[object, float | None, float | None]] = {
        stage: (c.calls, c.flops, c.fewest_bytes) for stage, c in counts.items()
    }
    counted[OUTSIDE] = ("", work - sum(c.flops for c in counts.values()), None)
    counted[TOTAL] = ("", work, fewest_bytes(problem, forward_pass(problem)))
    origin = {"tool": tool} | provenance(device)
    rows = []
    for stage in (*stages, OUTSIDE, TOTAL):
        calls, operations, moved = counted.get(stage, ("", None, None))
        found = measured.get(stage)
        least = None if operations is None or moved is None else limits.limit(operations, moved)
        rows.append(
            case_columns(problem.case)
            | {"variant": problem.variant.name, "stage": stage, "calls": calls}
            | _measured_columns(found)
            | {"gflop": _cell(operations, 1e9), "fewest_mib": _cell(moved, 2**20), "least_ms": _cell(least, 1e-3)}
            | {"ceiling_gflops": _cell(limits.flops, 1e9), "ceiling_gbs": _cell(limits.bytes, 1e9)}
            | origin
        )
    return rows


def _measured_columns(work: Work | None) -> Row:
    """The columns that the tool measured, empty where it did not."""
    if work is None:
        return dict.fromkeys(("launches", "time_ms", "read_mib", "written_mib", "tensor_share"), "")
    return {
        "launches": work.launches,
        "time_ms": _cell(work.seconds, 1e-3),
        "read_mib": _cell(work.read, 2**20),
        "written_mib": _cell(work.written, 2**20),
        "tensor_share": _cell(work.tensor, 1),
    }


def _cell(value: float | None, unit: float) -> str:
    return "" if value is None else number(value / unit)


def profile(case: Case, variant: str, device: torch.device, limits: Ceilings, log: Callable[[str], None]) -> list[Row]:
    """The rows of one case and variant."""
    problem = make_problem(case, variant, device)
    counts = count(layer_calls(problem))
    tool, works = measure(problem, device, bool(counts), log)
    return rows_of(problem, device, limits, tool, works, counts)


def show(rows: Sequence[Row]) -> str:
    """The measured and counted columns as text."""
    names = ("stage", "calls", "launches", "time_ms", "least_ms", "read_mib", "written_mib", "fewest_mib",
             "tensor_share", "gflop")  # fmt: skip
    return text_table(names, [[str(row[name]) for name in names] for row in rows])


def command(
    case: Annotated[str, typer.Argument(help='Its name, such as "unetr qkv", "unetr encoder", "llama-7b block".')],
    variant: Annotated[str, typer.Option(help="A variant of the benchmark.")] = "tcur native",
    rank: Annotated[int | None, typer.Option(help="Tubal rank. Default: the case's, as of the next three.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows of a layer's input.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
    mode: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODES)}.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where it is.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of results; a device has a folder of its own in it.")] = Path(
        "bench/results"
    ),
    only_run: Annotated[bool, typer.Option("--only-run", hidden=True)] = False,
) -> None:
    """Profile one step of a case and write a table and a picture of its stages."""
    target = choose_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose_case(case, rank=rank, tokens=tokens, dtype=dtype, mode=mode)
    if only_run:
        one_step(make_problem(chosen, variant, target), target)
        return
    limits = ceilings(getattr(torch, chosen.dtype), target)
    rows = profile(chosen, variant, target, limits, typer.echo)
    path = output / folder_name(device_name(target)) / f"{folder_name(f'profile-{chosen.name}-{variant}')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    typer.echo(f"\n{show(rows)}\n\n{path}\n{path.with_suffix('.png')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 2 for wrong input."""
    return run_command(command, arguments, "python -m tcurlora_ext.bench.profile")
