"""What Nsight's CSV says. The texts are written by hand in the tools' documented format; no tool ran."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest
import torch

from tcurlora_ext.bench.cases import Layer, of_layer
from tcurlora_ext.bench.profile import annotated, command, nsight
from tcurlora_ext.bench.profile.measured import OUTSIDE, TOTAL, Work, by_stage
from tcurlora_ext.bench.profile.nsight import RANGES, READ, TENSOR, TIME, WRITTEN, ToolError, ncu_work, nsys_work

H, MIDDLE, DX = "h = x row^T", "dh = p B, dcore = diag(p^T h)", "dx = g W + dh row"
METRICS = (READ, WRITTEN, TIME, TENSOR)


def inside(*ranges: str) -> str:
    """A kernel's push/pop ranges as ncu writes them: the thread, then each range in quotes."""
    return "1  " + " ".join(f' "{name}:none:none:none:none:none:none"' for name in ranges)


def ncu_csv(units: tuple[str, ...], *kernels: tuple[str, ...]) -> str:
    """The raw page: other lines, the header, a row of units, a row a kernel."""
    text = io.StringIO()
    text.write("==PROF== Connected to process 7 (/usr/bin/python3.12)\n==PROF== Disconnected from process 7\n")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["ID", "Process ID", RANGES, "Kernel Name", *METRICS])
    writer.writerow(["", "", "", "", *units])
    for index, (ranges, *values) in enumerate(kernels):
        writer.writerow([index, 7, ranges, "gemm<float, 128, 64>", *values])
    return text.getvalue()


def test_ncu_adds_up_the_kernels_of_a_stage() -> None:
    text = ncu_csv(
        ("byte", "byte", "ns", "%"),
        (inside(f"tcurlora:{H}"), "1,048,576", "2,048", "1,000", "80.00"),
        (inside(f"tcurlora:{H}"), "1048576", "0", "3000", "40.00"),
        (inside(f"<default domain>:step 1, {DX}", f"tcurlora:{MIDDLE}"), "10", "20", "500", "0"),
        ("", "64", "64", "250", "0"),
        (inside("<default domain>:h = x row^T"), "1", "1", "250", "0"),
    )
    found = by_stage(ncu_work(text))
    assert list(found) == [H, MIDDLE, OUTSIDE, TOTAL]
    assert found[H] == Work(H, pytest.approx(4e-6), 2, 2 * 2**20, 2048, pytest.approx(0.5))
    assert found[MIDDLE] == Work(MIDDLE, pytest.approx(5e-7), 1, 10, 20, 0)
    assert found[OUTSIDE] == Work(OUTSIDE, pytest.approx(5e-7), 2, 65, 65, 0)
    assert found[TOTAL].launches == 5


def test_ncu_in_scaled_units_and_without_a_metric() -> None:
    text = ncu_csv(("Mbyte", "Kbyte", "us", ""), (inside(f"tcurlora:{H}"), "1.50", "2.00", "12.00", "n/a"))
    assert ncu_work(text) == [Work(H, pytest.approx(12e-6), 1, pytest.approx(1.5e6), pytest.approx(2e3), None)]


def test_the_innermost_stage_counts_whatever_its_colour() -> None:
    cell = '140  "tcurlora:h = x row^T:none:none:ARGB:255:REGISTERED:7"  "tcurlora:m = h B^T:none:none:none:none:none"'
    assert nsight.ncu_stage(cell) == "m = h B^T"
    assert nsight.ncu_stage('140  "tcurlora:something else:none:none:none:none:none:none"') == OUTSIDE


def test_ncu_without_kernels_or_ranges() -> None:
    assert ncu_work("==ERROR== ERR_NVGPUCTRPERM\n") == []
    assert ncu_work(ncu_csv(("byte", "byte", "ns", "%"))) == []
    with pytest.raises(ToolError, match="has no column 'thread Domain"):
        ncu_work(f'"ID","{TIME}"\n"","ns"\n"0","5"\n')


STATS = """Generating SQLite file step.sqlite from step.nsys-rep
Processing [step.sqlite] with [/opt/nvidia/nsight-systems/reports/{report}.py]...

{table}
"""
NSYS_RANGES = STATS.format(
    report="nvtx_kern_sum",
    table=(
        "NVTX Range,Style,PID,TID,NVTX Inst,Kern Inst,Total Time (ns),Avg (ns),Kernel Name\n"
        f'tcurlora:{H},PushPop,7,7,12,12,"24,000",2000.0,gemm\n'
        f"tcurlora:{H},PushPop,7,7,12,24,6000,250.0,splitk_reduce\n"
        f'"tcurlora:{MIDDLE}",PushPop,7,9,12,12,1000,83.3,"void steps_of<Backward, 8>(Backward::Params)"\n'
        ":step,PushPop,7,7,1,60,60000,1000.0,gemm"
    ),
)
NSYS_KERNELS = STATS.format(
    report="cuda_gpu_kern_sum",
    table=(
        '"Time (%)","Total Time (ns)","Instances","Avg (ns)","Name"\n'
        '"90.0","45,000","30","1500.0","gemm"\n"10.0","5000","30","166.7","softmax"'
    ),
)


def test_nsys_puts_what_no_stage_has_outside() -> None:
    found = by_stage(nsys_work(NSYS_RANGES, NSYS_KERNELS))
    assert {stage: (work.launches, round(1e9 * work.seconds)) for stage, work in found.items()} == {
        H: (36, 30000), MIDDLE: (12, 1000), OUTSIDE: (12, 19000), TOTAL: (60, 50000),
    }  # fmt: skip
    assert found[H].read is found[H].tensor is None


def test_nsys_in_another_unit() -> None:
    ranges = NSYS_RANGES.replace("Total Time (ns)", "Total Time (us)")
    assert nsys_work(ranges, NSYS_KERNELS)[0].seconds == pytest.approx(0.024)


def test_nsys_without_kernels() -> None:
    assert nsys_work("SKIPPED: step.sqlite does not contain NV Tools Extension (NVTX) data.\n", "SKIPPED\n") == []


def program(path: Path, text: str) -> Path:
    """A program of that name that stands in for a profiler."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_tools_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setitem(nsight.FOLDERS, "ncu", "none")
    assert nsight.find("ncu") is None
    (tmp_path / "bin").mkdir()
    tool = program(tmp_path / "bin" / "ncu", "")
    assert nsight.find("ncu") == str(tool)
    (tmp_path / "path").mkdir()
    first = program(tmp_path / "path" / "ncu", "")
    assert nsight.find("ncu") == str(first)


def test_a_stand_in_for_ncu(tmp_path: Path) -> None:
    """The file that --log-file names is read, and the command comes last."""
    text = ncu_csv(("byte", "byte", "ns", "%"), (inside(f"tcurlora:{H}"), "1", "2", "3", "4"))
    tool = program(
        tmp_path / "ncu",
        "import sys, pathlib\n"
        "assert sys.argv[-2:] == ['step', '--only-run'], sys.argv\n"
        f"pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1]).write_text({text!r})\n",
    )
    assert [work.stage for work in nsight.profile("ncu", str(tool), ["step", "--only-run"])] == [H]


def test_a_stand_in_for_nsys(tmp_path: Path) -> None:
    tool = program(
        tmp_path / "nsys",
        "import sys\n"
        f"tables = {{'nvtx_kern_sum': {NSYS_RANGES!r}, 'cuda_gpu_kern_sum': {NSYS_KERNELS!r}}}\n"
        "if sys.argv[1] == 'stats': print(tables[sys.argv[sys.argv.index('--report') + 1]])\n",
    )
    assert [work.stage for work in nsight.profile("nsys", str(tool), ["step"])] == [H, H, MIDDLE, OUTSIDE]


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    log = "==ERROR== ERR_NVGPUCTRPERM - no permission to access the counters\\n==PROF== bye\\n"
    refused = program(
        tmp_path / "ncu",
        "import sys, pathlib\n"
        f"pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1]).write_text('{log}')\nsys.exit(3)\n",
    )
    with pytest.raises(ToolError, match="exit code 3: ==ERROR== ERR_NVGPUCTRPERM"):
        nsight.profile("ncu", str(refused), ["step"])
    silent = program(
        tmp_path / "silent", "import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index('--log-file') + 1]).touch()\n"
    )
    with pytest.raises(ToolError, match="saw no kernel"):
        nsight.profile("ncu", str(silent), ["step"])


CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASE = of_layer(Layer("of a test", 24, 40, 3, 6), 32, rank=2)
STAGES, NO_STAGES = [Work(H, 1e-3)], [Work(OUTSIDE, 1e-3)]


@pytest.mark.parametrize(
    ("ncu", "nsys", "tool", "why"),
    [
        (STAGES, STAGES, "ncu", ["ncu: /bin/ncu"]),
        (None, STAGES, "nsys", ["ncu: not found on the PATH", "nsys: /bin/nsys"]),
        (ToolError("no permission"), STAGES, "nsys", ["ncu: /bin/ncu failed: no permission", "nsys: /bin/nsys"]),
        (NO_STAGES, None, "torch.profiler", ["ncu: saw no stage", "nsys: not found", "torch.profiler: "]),
    ],
)
def test_the_first_tool_that_sees_the_stages_is_taken(
    monkeypatch: pytest.MonkeyPatch, ncu: object, nsys: object, tool: str, why: list[str]
) -> None:
    seen = {"ncu": ncu, "nsys": nsys}

    def look(name: str, _path: str, _command: list[str]) -> object:
        if isinstance(seen[name], ToolError):
            raise seen[name]
        return seen[name]

    monkeypatch.setattr(nsight, "find", lambda name: None if seen[name] is None else f"/bin/{name}")
    monkeypatch.setattr(nsight, "profile", look)
    monkeypatch.setattr(annotated, "profile", lambda *_: STAGES)
    problem, said = command.make_problem(CASE, "tcur eager", CPU), []
    assert command.measure(problem, GPU, True, said.append) == (tool, STAGES)
    assert all(line.startswith(start) for line, start in zip(said, why, strict=True)), said


def test_the_process_under_nsight_runs_one_step_of_the_same_case(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(nsight, "find", lambda name: f"/bin/{name}")
    monkeypatch.setattr(nsight, "profile", lambda _tool, _path, words: commands.append(words) or STAGES)
    monkeypatch.setattr(command, "every", lambda: iter([of_layer(CASE.layer, 99)]))
    command.measure(command.make_problem(CASE, "tcur eager", CPU), GPU, True, lambda _: None)

    events: list[object] = []
    make = command.make_problem

    def watched(*arguments: object) -> object:
        problem = make(*arguments)
        assert problem.case == CASE
        step = problem.step
        problem.step = lambda: (events.append("step"), step())
        return problem

    monkeypatch.setattr(command, "make_problem", watched)
    monkeypatch.setattr(command, "choose_device", lambda name: CPU if name == "cuda" else None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    python, flag, module, *arguments = commands[0]
    assert (python, flag, module) == (sys.executable, "-m", "tcurlora_ext.bench.profile")
    assert command.main(arguments) == 0
    assert events == ["start", "step", "stop"]
