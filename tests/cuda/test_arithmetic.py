"""The kernels' own code, compiled for the CPU and run against the definition: tests/cpp/*_kernels_test.cpp."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM, RIDING = "cuda_kernels_test.cpp", "riding_kernels_test.cpp"


def checks(program: Path, *arguments: str) -> tuple[int, str]:
    """The number of checks, all of which held, and what the program printed."""
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    summary = re.search(r"^(\d+) checks, 0 failed", ran.stdout, re.MULTILINE)
    assert summary, ran.stdout
    return int(summary[1]), ran.stdout


def test_every_kernel_computes_the_definition(build: Callable[..., Path]) -> None:
    """In float32 and float64, whatever the compiler finds of a CUDA toolkit."""
    assert checks(build(PROGRAM))[0] > 10_000


def test_every_kernel_of_the_riding_form_computes_the_definition(build: Callable[..., Path]) -> None:
    assert checks(build(RIDING))[0] > 700


@pytest.mark.slow
def test_half_types_too(build: Callable[..., Path], cuda_headers: list[str]) -> None:
    for program, least in ((PROGRAM, 3_000), (RIDING, 600)):
        number, said = checks(build(program, *cuda_headers), "quick")
        assert number > least
        assert "with half types" in said


@pytest.mark.slow
def test_no_access_outside_an_array_and_no_undefined_behaviour(
    build: Callable[..., Path], sanitizer: Callable[[str], list[str]]
) -> None:
    for program, least in ((PROGRAM, 1_000), (RIDING, 300)):
        assert checks(build(program, *sanitizer("address,undefined")), "quick")[0] > least
