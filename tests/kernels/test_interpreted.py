"""Runs interpreted*.py in new processes: Triton interprets only if that was set before it was imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Every kernel with every gradient in float32, and what is refused; all else takes eight minutes more.
_FIRST = (
    "(test_forward_and_every_gradient and float32) or refused or not_saved or twice or summed_in_float32 or "
    "follow_the_setting or registered or another_dtype or a_plan"
)
# The same of the riding form. Triton's interpreter computes wrongly in bfloat16.
_RIDING = HERE / "interpreted_riding.py"
_RIDING_FIRST = (
    "(test_the_changed_input and float32 and fallback) or is_asked_for or outside or refused or not_saved or wider or "
    "no_tokens or share_a_plan"
)
_OPERATOR = HERE.parent / "operator" / "test_riding.py"
_OPERATOR_FIRST = "(at_most_twice and float32) or (zero_core and float32) or compiled_whole"
_INTERPRETED = "triton and not bfloat16 and not autocast"


def run(part: str, file: Path = HERE / "interpreted.py") -> None:
    """Run the tests of a ``-k`` expression in a process whose kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", part]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter() -> None:
    run(_FIRST)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter_with_every_option() -> None:
    run(f"not ({_FIRST})")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_riding_kernels_in_the_interpreter() -> None:
    run(_RIDING_FIRST, _RIDING)
    run(f"{_INTERPRETED} and ({_OPERATOR_FIRST})", _OPERATOR)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_riding_kernels_in_the_interpreter_with_every_option() -> None:
    run(f"not ({_RIDING_FIRST})", _RIDING)
    run(f"{_INTERPRETED} and not ({_OPERATOR_FIRST})", _OPERATOR)
