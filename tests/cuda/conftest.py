"""The compilers that these tests need; where one is missing, its tests are skipped with that reason."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WARNINGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder of the CUDA sources."""
    return ROOT / "csrc" / "cuda"


@pytest.fixture
def build(compiler: str, tmp_path: Path) -> Callable[..., Path]:
    """Compiles a program of tests/cpp with further options and returns its path."""

    def compile(source: str, *options: str) -> Path:
        program = tmp_path / source.split(".")[0]
        command = [compiler, *WARNINGS, *options, str(ROOT / "tests" / "cpp" / source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return program

    return compile


@pytest.fixture
def sanitizer(compiler: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """Compiler options for these sanitizers; the test is skipped where a program with them does not run."""

    def options(names: str) -> list[str]:
        chosen = ["-g1", f"-fsanitize={names}", "-fno-sanitize-recover=all"]
        (tmp_path / "empty.cpp").write_text("int main() {}\n")
        command = [compiler, *chosen, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
        for step in (command, [str(tmp_path / "empty")]):
            if subprocess.run(step, capture_output=True, check=False).returncode != 0:
                pytest.skip(f"no program with the sanitizers {names} runs here")
        return chosen

    return options


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
