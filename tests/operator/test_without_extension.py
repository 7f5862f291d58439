"""The operators as Python registers them, where the extension is not built: tests of this folder again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)
RUN = """
import sys
import pytest
sys.modules["tcurlora_ext._C"] = None  # as if it were not built
import tcurlora_ext as tcur
assert not tcur.backends()["native"]
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--ignore", str(HERE), *arguments, str(HERE.parent)],
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_registration_golden_vectors_and_gradients_without_the_extension() -> None:
    run("-m", "not slow", "-k", "opcheck or fakes or golden or gradcheck")


@pytest.mark.slow
def test_the_operators_registered_from_python_pass_the_same_tests() -> None:
    run()
