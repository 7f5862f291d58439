"""The kernels' own code, compiled for the CPU and run against the definition: tests/cpp/cuda_kernels_test.cpp."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "cpp" / "cuda_kernels_test.cpp"
WARNINGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]


def build_and_run(compiler: str, options: list[str], arguments: list[str], folder: Path) -> str:
    """What the program printed, after it ended well."""
    program = folder / "cuda_kernels_test"
    command = [compiler, *WARNINGS, *options, str(PROGRAM), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


def checks(said: str) -> int:
    summary = re.search(r"^(\d+) checks, 0 failed", said, re.MULTILINE)
    assert summary, said
    return int(summary[1])


def test_every_kernel_computes_the_definition(compiler: str, tmp_path: Path) -> None:
    """In float32 and float64, whatever the compiler finds of a CUDA toolkit."""
    assert checks(build_and_run(compiler, [], [], tmp_path)) > 10_000


@pytest.mark.slow
def test_half_types_too(compiler: str, cuda_headers: list[str], tmp_path: Path) -> None:
    said = build_and_run(compiler, cuda_headers, ["quick"], tmp_path)
    assert checks(said) > 3_000
    assert "with half types" in said


@pytest.mark.slow
def test_no_access_outside_an_array_and_no_undefined_behaviour(compiler: str, tmp_path: Path) -> None:
    options = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [compiler, *options, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined-behaviour sanitizers")
    assert checks(build_and_run(compiler, options, ["quick"], tmp_path)) > 1_000
