"""The operators as registered from Python, without the extension: runs all other tests of this folder again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = """
import sys
import pytest
sys.modules["tcurlora_ext._C"] = None  # as if it were not built
import tcurlora_ext as tcur
assert not tcur.backends()["native"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--ignore", sys.argv[1], sys.argv[2]]))
"""


def test_the_operators_registered_from_python_pass_the_same_tests() -> None:
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(here), str(here.parent)],
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
