"""bench/gpu.sh without a GPU: its steps are replaced by a command that ends well, fails or hangs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tcurlora_ext.bench.cases import SETS
from tcurlora_ext.bench.names import operator_variants
from tcurlora_ext.bench.results import selected
from tcurlora_ext.operator.backends import missing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
PARTS = {
    "a": ["wheels", "build", "kernels", "smoke", "cuda", "operator", "bench"],
    "b": [
        "wheels", "build", "kernels", "triton", "bench-triton", "memcheck", "racecheck", "profile", "compiled",
    ],
}  # fmt: skip
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="no bash or no GNU timeout on the PATH"
)


def environment(**given: str) -> dict[str, str]:
    """That of the tests without the script's own variables; a dry run by echo unless ``given`` says otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TCURLORA_GPU_")}
    return kept | {"PYTHON": sys.executable, "TCURLORA_GPU_DRY_RUN": "echo"} | given


def run(folder: Path, *arguments: str, **given: str) -> tuple[int, str]:
    """The exit code and the output of the script with results in a folder."""
    done = subprocess.run(
        ["bash", SCRIPT, folder / "results", *arguments], env=environment(**given), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def step(folder: Path, lines: str) -> str:
    """A command for dry runs: ``lines`` of bash, in which $1 is the part's name."""
    path = folder / "step.sh"
    path.write_text(f"{lines}\necho done with $1\n")
    return f"bash {path}"


def summary(said: str) -> dict[str, str]:
    """Part -> what the table at the end of the output says of it."""
    lines = said.split("\n\n")[-1].splitlines()
    found = [re.fullmatch(r"(\S+) +(passed|FAILED|TIME-OUT|stopped|not run) +\d+ s  .*", line) for line in lines]
    assert all(found), said
    return {line[1]: line[2] for line in found if line}


def steps(said: str) -> dict[str, list[str]]:
    """Part -> the words of the command that a dry run by echo shows for it."""
    lines = re.findall(r"^== (\S+), at most \d+ s\n\1 (.*)$", said, re.M)
    return {name: command.split() for name, command in lines}


@pytest.fixture
def wheels(tmp_path: Path) -> str:
    """A folder with the wheel of a package of one module."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "made_up-1.0-py3-none-any.whl", "w") as file:
        file.writestr("made_up.py", "")
        about = "made_up-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: made_up\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return str(folder)


@pytest.mark.parametrize("call", ["a", "b"])
def test_the_time_outs_of_a_call_add_up_to_less_than_five_minutes(call: str, wheels: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, call, TCURLORA_GPU_WHEELS=wheels)
    assert code == 0, said
    assert summary(said) == dict.fromkeys(PARTS[call], "passed")
    total, plan = said.splitlines()[0].removeprefix("at most ").split(" s: ")
    limits = {name: int(limit) for name, limit in (part.split() for part in plan.split(","))}
    assert list(limits) == PARTS[call]
    assert sum(limits.values()) + 2 * len(limits) == int(total) < 300  # 2 s for a step that does not end when asked to
    assert limits.get("smoke", 0) <= 10
    for name, limit in re.findall(r"^== (\S+), at most (\d+) s$", said, re.M):
        assert limits[name] <= int(limit) <= 2 * limits[name]
    assert (tmp_path / "results" / "gpu.log").read_text().strip().endswith(said.split("\n\n")[-1].strip())


@pytest.mark.parametrize(("call", "broken"), [("a", "cuda"), ("b", "triton")])
def test_a_part_that_fails_does_not_hide_the_others(call: str, broken: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, call, TCURLORA_GPU_DRY_RUN=step(tmp_path, f"[ $1 != {broken} ] || exit 3"))
    assert code == 1
    expected = dict.fromkeys(PARTS[call][1:], "passed") | {broken: "FAILED"}
    assert summary(said) == expected


@pytest.mark.parametrize(("call", "hanging"), [("a", "smoke"), ("b", "compiled")])
def test_a_part_that_hangs_is_ended_also_where_it_ignores_the_signal(call: str, hanging: str, tmp_path: Path) -> None:
    lines = f"[ $1 != {hanging} ] || {{ trap '' TERM; echo waits; sleep 600; }}"
    code, said = run(tmp_path, call, TCURLORA_GPU_DRY_RUN=step(tmp_path, lines), TCURLORA_GPU_SECONDS="2")
    assert code == 1
    assert summary(said) == dict.fromkeys(PARTS[call][1:], "passed") | {hanging: "TIME-OUT"}
    assert re.search(rf"^{hanging} +TIME-OUT +\d+ s  waits$", said, re.M)  # what it had said by then


def test_the_table_is_last_also_where_the_script_is_told_to_end(tmp_path: Path) -> None:
    lines = f"[ $1 != smoke ] || {{ echo $$ > {tmp_path}/waits; exec sleep 600; }}"
    script = subprocess.Popen(
        ["bash", SCRIPT, tmp_path / "results", "a"], env=environment(TCURLORA_GPU_DRY_RUN=step(tmp_path, lines)),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "waits").exists() or not (tmp_path / "waits").read_text():
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    said = script.communicate()[0]
    assert script.returncode == 128 + signal.SIGTERM
    ended = {"build": "passed", "kernels": "passed", "smoke": "stopped"}
    assert summary(said) == dict.fromkeys(PARTS["a"][1:], "not run") | ended
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waits").read_text()), 0)


@pytest.mark.parametrize("broken", ["build", "kernels"])
def test_without_cuda_kernels_nothing_else_runs(broken: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, "b", TCURLORA_GPU_DRY_RUN=step(tmp_path, f"[ $1 != {broken} ] || exit 1"))
    assert code == 1
    before = {"build": {}, "kernels": {"build": "passed"}}[broken]
    assert summary(said) == dict.fromkeys(PARTS["b"][1:], "not run") | before | {broken: "FAILED"}


@pytest.mark.skipif(not missing("native", "cuda"), reason="the extension has CUDA kernels")
def test_an_extension_for_the_cpu_is_not_taken_for_one_with_cuda_kernels(wheels: str, tmp_path: Path) -> None:
    """No dry run, in a folder of its own: wheels are installed, and the extension that is there is looked at."""
    (tmp_path / "bench").mkdir()
    shutil.copy(SCRIPT, tmp_path / "bench")
    (tmp_path / "tcurlora_ext").symlink_to(ROOT / "tcurlora_ext")
    done = subprocess.run(
        ["bash", tmp_path / "bench" / "gpu.sh", tmp_path / "results", "smoke"], text=True, check=False,
        env=environment(TCURLORA_GPU_DRY_RUN="", TCURLORA_GPU_WHEELS=wheels, TCURLORA_GPU_SECONDS="100"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 1
    assert summary(done.stdout) == {"wheels": "passed", "kernels": "FAILED", "smoke": "not run"}
    assert (tmp_path / "build" / "wheels" / "made_up.py").exists()
    assert re.search("^kernels .*(expected cuda too|cannot import name '_C'.*)$", done.stdout, re.M)


def test_the_layers_are_measured_by_each_backend_once_and_by_compiled_forms_last(tmp_path: Path) -> None:
    commands = steps(run(tmp_path)[1])
    layers = {"llama-3-8b q,o", "unetr qkv", "unetr out_proj", "unetr linear1", "unetr linear2"}
    found: dict[str, tuple[set[str], set[str]]] = {}
    for name in ("bench", "bench-triton", "compiled"):
        words = " ".join(commands[name]).split("--cases ")[1].split(" --variants ")
        cases, variants = (part.split(",") for part in words)
        measured = selected(SETS["gpu"](), cases)
        assert {case.mode for case in measured} == {"training"}
        found[name] = {case.name for case in measured}, set(variants)
    assert found["bench"] == (layers, {"tcur eager", "tcur native"})
    assert found["bench-triton"] == (layers, {"tcur triton"})
    assert found["compiled"] == ({"llama-3-8b q,o"}, {"compiled"})
    assert found["bench"][1] | found["bench-triton"][1] == set(operator_variants())
    assert list(commands)[-1] == "compiled"


def test_tests_run_where_they_can_and_sanitizers_on_the_native_kernels_alone(tmp_path: Path) -> None:
    said = run(tmp_path)[1]
    commands = {name: " ".join(words) for name, words in steps(said).items()}
    assert "tests/kernels" not in said  # of the interpreter and of compilation ahead of time
    for part, tests, chosen in (
        ("cuda", "tests/operator/test_cuda.py", "not triton"),
        ("operator", "tests/operator", "not triton"),
        ("triton", "tests/operator", "triton"),
    ):
        assert commands[part].startswith("env TCURLORA_TEST_DEVICE=cuda ")
        assert f" {tests} " in commands[part]
        assert commands[part].endswith(f" -k {chosen}")
        assert (" -n 12 " in commands[part]) == (part != "cuda")
    for part in ("memcheck", "racecheck"):
        assert "--target-processes application-only" in commands[part]
        assert commands[part].endswith(
            f"--tool {part} {sys.executable} -m tcurlora_ext.bench.sanitize --variant tcur native"
        )


def test_without_xdist_tests_run_in_one_process(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    code, said = run(tmp_path, PYTHON=str(python))
    assert code == 0
    assert "tests/operator" in said
    assert " -n " not in said


@pytest.mark.parametrize("place", ["bin", "compute-sanitizer"])
def test_compute_sanitizer_is_found_beside_cuda_too(place: str, tmp_path: Path) -> None:
    tool = tmp_path / "cuda" / place / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    path = tmp_path / "bin"  # without the folders of a toolkit that is installed here
    path.mkdir()
    for name in ("bash", "timeout", "dirname", "mkdir", "tee", "wc", "tail", "tr", "cut", "ls", "head", "echo"):
        (path / name).symlink_to(str(shutil.which(name)))
    said = run(tmp_path, "memcheck", CUDA_HOME=str(tmp_path / "cuda"), PATH=str(path))[1]
    assert f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {tool} " in said


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "found no folder for the results"), (("r", "c"), "found part 'c'")]
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(["bash", SCRIPT, *arguments], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"bench/gpu.sh: {message}; usage: PYTHON=python3 bench/gpu.sh RESULTS [a] [b]")


@pytest.mark.parametrize(
    ("target", "expected"), [("gpu", "a b networks"), ("gpu-bench", "build set")], ids=["gpu", "gpu-bench"]
)
def test_make_calls_the_script(target: str, expected: str) -> None:
    command = ["make", "--dry-run", "--no-print-directory", target, "PYTHON=python9", "RESULTS=/results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout) == ["PYTHON=python9", "bench/gpu.sh", "/results", *expected.split()]
