"""Runs interpreted.py in new processes: Triton interprets only if that was set before it was imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Two processes for two cores: about half of the time each.
_ONE = "test_forward_and_every_gradient or test_one_launch or test_hopper"
PARTS = {"one half": _ONE, "the other half": f"not ({_ONE})"}


@pytest.fixture(scope="module")
def finished() -> dict[str, tuple[int, str]]:
    """The exit status and output of each part."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py"), "-k"]
    processes = {
        name: subprocess.Popen(
            [*command, part], env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for name, part in PARTS.items()
    }  # fmt: skip
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    return {name: (process.returncode, outputs[name]) for name, process in processes.items()}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_in_the_interpreter(finished: dict[str, tuple[int, str]], part: str) -> None:
    status, output = finished[part]
    assert status == 0, output[-6000:]
    assert " passed" in output
