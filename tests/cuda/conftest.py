"""The compilers that these tests need; where one is missing, its tests are skipped with that reason."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder of the CUDA sources."""
    return ROOT / "csrc" / "cuda"


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler on the PATH")
    return found


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("no nvcc on the PATH or in /usr/local/cuda/bin")
    return found


@pytest.fixture(scope="session")
def cuda_headers(nvcc: str) -> list[str]:
    """Compiler options for the include folders of the toolkit that nvcc belongs to, as nvcc itself says them."""
    said = subprocess.run([nvcc, "--dryrun", "-E", "none.cu"], capture_output=True, text=True, check=False).stderr
    folders = re.findall(r'"?-(?:I|isystem=?)\s*([^"\s]*include)"?', said)
    assert folders, f"{nvcc} --dryrun names no include folder: {said}"
    return [option for folder in dict.fromkeys(folders) for option in ("-isystem", folder)]
