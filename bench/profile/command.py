"""One step of a case under a profiler, stage by stage, beside the least that each stage has to do:

    python -m tcurlora_ext.bench.profile "unetr qkv" --variant "tcur native"

writes profile-<case>-<variant>.csv and .png into a folder of the device's name. Nsight Compute counts the bytes of the
device's memory and the tensor cores' use; without it Nsight Systems times the kernels; without either, and on a CPU,
torch.profiler does. What each column is and how to read them: docs/profiling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tcurlora_ext.io.records import write_csv
from tcurlora_ext.io.table import text_table

from ..cases import DTYPES, MODES, Case, every
from ..counts import fewest_bytes, flops
from ..devices import Ceilings, ceilings, choose_device, device_name, folder_name, provenance, wait
from ..memory import forward_pass
from ..networks import build
from ..run import Row, about, number
from ..variants import Problem, prepare, variants
from . import annotated, nsight
from .figure import draw
from .measured import OUTSIDE, TOTAL, Work, by_stage
from .stages import Count, count, layer_calls

WARM_UP = 3
FALLBACK = "torch.profiler"


def choose_case(name: str, **changes: object) -> Case:
    """The first case of that name, with what is not None changed. ValueError naming the names that there are."""
    names = list(dict.fromkeys(case.name for case in every()))
    if name not in names:
        raise ValueError(f"no case is named {name!r}; expected one of: {'; '.join(names)}")
    for key in ("rank", "tokens"):
        value = changes.get(key)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{key} is {value}, expected at least 1")
    case = next(case for case in every() if case.name == name)
    return replace(case, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]


def make_problem(case: Case, variant: str, device: torch.device) -> Problem:
    """The case in that form, after its warm-up. ValueError where there is no such form here or of this case."""
    network = build(case, device)
    known = {form.name: form for form in variants(device) if form.fits(case, network)}
    if variant not in known:
        raise ValueError(f"{case.id} has no variant {variant!r} on {device}; expected one of: {'; '.join(known)}")
    problem = prepare(known[variant], case, network)
    for _ in range(WARM_UP):
        problem.step()
    wait(device)
    return problem


def one_step(problem: Problem, device: torch.device) -> None:
    """What runs under Nsight: one step between cudaProfilerStart and cudaProfilerStop."""
    wait(device)
    torch.cuda.profiler.start()
    problem.step()
    wait(device)
    torch.cuda.profiler.stop()


def measure(
    problem: Problem, device: torch.device, has_stages: bool, say: Callable[[str], None]
) -> tuple[str, list[Work]]:
    """The name of the tool that worked and what it saw; ``say`` is told why those before it did not."""
    case = problem.case
    command = [
        sys.executable, "-m", "tcurlora_ext.bench.profile", case.name, "--variant", problem.variant.name,
        "--rank", str(case.rank), "--tokens", str(case.tokens), "--dtype", case.dtype, "--mode", case.mode,
        "--device", str(device), "--only-run",
    ]  # fmt: skip
    for tool in ("ncu", "nsys"):
        path = nsight.find(tool)
        if device.type != "cuda":
            say(f"{tool}: not used, {device} is no NVIDIA GPU")
        elif path is None:
            say(f"{tool}: not found on the PATH, in CUDA_HOME/bin or in /opt/nvidia/{nsight.FOLDERS[tool]}")
        else:
            try:
                works = nsight.profile(tool, path, command)
            except nsight.ToolError as error:
                say(f"{tool}: {path} failed: {error}")
                continue
            if not has_stages or any(work.stage != OUTSIDE for work in works):
                say(f"{tool}: {path}")
                return tool, works
            say(f"{tool}: saw no stage; those of Python need the package nvtx, those of C++ CUDA's header nvtx3")
    say(f"{FALLBACK}: {torch.__version__}")
    return FALLBACK, annotated.profile(problem, device)


def rows_of(
    problem: Problem,
    device: torch.device,
    limits: Ceilings,
    tool: str,
    works: Sequence[Work],
    counts: Mapping[str, Count],
) -> list[Row]:
    """One row a stage, then what is outside of all, then the whole step."""
    measured = by_stage(works)
    stages = list(dict.fromkeys([*counts, *(name for name in measured if name not in (OUTSIDE, TOTAL))]))
    work = flops(problem)
    counted: dict[str, tuple[object, float | None, float | None]] = {
        stage: (c.calls, c.flops, c.fewest_bytes) for stage, c in counts.items()
    }
    counted[OUTSIDE] = ("", work - sum(c.flops for c in counts.values()), None)
    counted[TOTAL] = ("", work, fewest_bytes(problem, forward_pass(problem)))
    source = {"tool": tool} | provenance(device)
    rows = []
    for stage in (*stages, OUTSIDE, TOTAL):
        calls, operations, moved = counted.get(stage, ("", None, None))
        found = measured.get(stage)
        least = None if operations is None or moved is None else limits.limit(operations, moved)
        rows.append(
            about(problem.case)
            | {"variant": problem.variant.name, "stage": stage, "calls": calls}
            | _measured_columns(found)
            | {"gflop": _cell(operations, 1e9), "fewest_mib": _cell(moved, 2**20), "least_ms": _cell(least, 1e-3)}
            | {"ceiling_gflops": _cell(limits.flops, 1e9), "ceiling_gbs": _cell(limits.bytes, 1e9)}
            | source
        )
    return rows


def _measured_columns(work: Work | None) -> Row:
    """Empty where nothing was seen or the tool cannot say."""
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


def profile(case: Case, variant: str, device: torch.device, limits: Ceilings, say: Callable[[str], None]) -> list[Row]:
    """The rows of one case in one form."""
    problem = make_problem(case, variant, device)
    counts = count(layer_calls(problem))
    tool, works = measure(problem, device, bool(counts), say)
    return rows_of(problem, device, limits, tool, works, counts)


def show(rows: Sequence[Row]) -> str:
    """The measured and counted columns as text."""
    names = ("stage", "calls", "launches", "time_ms", "least_ms", "read_mib", "written_mib", "fewest_mib",
             "tensor_share", "gflop")  # fmt: skip
    return text_table(names, [[str(row[name]) for name in names] for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 with one line on stderr for wrong input, as the command ``tcurlora`` has it."""
    parser = argparse.ArgumentParser(prog="python -m tcurlora_ext.bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("case", help='the name of a case, such as "unetr qkv", "unetr encoder", "llama-7b block"')
    parser.add_argument("--variant", default="tcur native", help="a form of the benchmark (default: tcur native)")
    parser.add_argument("--rank", type=int, help="tubal rank")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--only-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
        case = choose_case(
            options.case, rank=options.rank, tokens=options.tokens, dtype=options.dtype, mode=options.mode
        )
        if options.only_run:
            one_step(make_problem(case, options.variant, device), device)
            return 0
        limits = ceilings(getattr(torch, case.dtype), device)
        rows = profile(case, options.variant, device, limits, print)
        name = folder_name(f"profile-{case.name}-{options.variant}")
        path = options.output / folder_name(device_name(device)) / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, rows)
        draw(rows, path.with_suffix(".png"))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{show(rows)}\n\n{path}\n{path.with_suffix('.png')}")
    return 0
