"""How setup.py builds the extension: which CUDA toolkit it takes, and what TCURLORA_BUILD makes of a failure.

Nothing is compiled: compilers are scripts that say their version and fail.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
# A torch without CUDA, made to look like a CUDA build. setup.py runs as "python setup.py ..." runs it.
PROGRAM = """
import runpy, sys, torch
torch.version.cuda = sys.argv[1] or None
sys.argv = ["setup.py", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment that names no toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, lines: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path, headers: str = "include") -> Path:
    """A folder like a CUDA toolkit. Its nvcc says its version and, in a dry run, its folder; it compiles nothing."""
    script(
        folder / "bin" / "nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--dryrun) echo '#$ _HERE_={folder}/bin' >&2; echo '#$ TOP={folder}/bin/..' >&2 ;;
*) exit 1 ;;
esac""",
    )
    (folder / headers).mkdir(parents=True)
    (folder / headers / "cuda_runtime.h").touch()
    return folder


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit in real/, and on the PATH nothing but a script local/bin/nvcc that calls its nvcc."""
    folder = toolkit(tmp_path / "real")
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", f'exec {folder}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", str(wrapper.parent))
    return folder


def test_the_toolkit_is_the_one_that_a_wrapper_of_nvcc_calls(
    setup_script: ModuleType, wrapped: Path, tmp_path: Path
) -> None:
    found, searched = setup_script.find_cuda()
    assert found == wrapped
    assert f"(tried {tmp_path}/local, {wrapped})" in searched


def test_cuda_home_comes_first_where_it_is_a_toolkit(
    setup_script: ModuleType, wrapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "asked", headers="targets/x86_64-linux/include")))
    assert setup_script.find_cuda()[0] == tmp_path / "asked"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "local"))  # as torch guesses it from the wrapper: no headers
    assert setup_script.find_cuda()[0] == wrapped


def test_without_a_toolkit_the_folders_are_named(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script, "cuda_folders", lambda: [Path("/one"), Path("/two")])
    assert setup_script.find_cuda() == (None, "no CUDA toolkit, bin/nvcc and include/cuda_runtime.h, in /one, /two")


def test_usr_local_cuda_is_tried_last(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert setup_script.cuda_folders() == [Path("/usr/local/cuda")]


def build(folder: Path, cuda: str, **environment: str) -> tuple[int, str]:
    """The exit code and the output of "setup.py build_ext" with a torch for this CUDA version, "" for none.

    The C++ compiler says its version and fails at everything else.
    """
    compiler = script(
        folder / "c++", 'case "$1" in -dumpfullversion) echo 13.2.0 ;; --version) echo g++ ;; *) exit 1 ;; esac'
    )
    places = ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    unset = ("CUDA_HOME", "CUDA_PATH", "TCURLORA_BUILD")
    given = {"CXX": str(compiler), "MAX_JOBS": "1", "TORCH_DONT_CHECK_COMPILER_ABI": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cuda, "build_ext", *places], cwd=ROOT, check=False, text=True,
        env={name: value for name, value in os.environ.items() if name not in unset} | given,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_failed_cuda_build_falls_back_and_says_so(wrapped: Path, tmp_path: Path) -> None:
    """To the C++ extension, which fails here too, and then to pure Python."""
    PATH = os.environ["PATH"] + os.pathsep + os.defpath
    code, said = build(tmp_path, "13.0", PATH=PATH)
    assert code == 0, said
    assert f"CUDA toolkit: {wrapped} (tried {tmp_path}/local, {wrapped})" in said
    assert f"-I{wrapped}/include" in said  # torch builds with that folder
    assert said.index("without CUDA kernels: ") < said.index("without its C++ extension: ")


@pytest.mark.parametrize(
    ("cuda", "part"), [("13.0", "CUDA kernels"), ("", "its C++ extension")], ids=["torch for CUDA", "torch for the CPU"]
)
def test_asked_for_a_failed_build_is_an_error(cuda: str, part: str, tmp_path: Path) -> None:
    code, said = build(tmp_path, cuda, CUDA_HOME=str(toolkit(tmp_path / "cuda")), TCURLORA_BUILD="1")
    assert code == 1
    assert f"tcurlora_ext: without {part}, which TCURLORA_BUILD=1 asks for: " in said


def test_a_cuda_torch_without_a_toolkit_gets_the_cpu_part_or_an_error(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup_script, "cuda_folders", lambda: [Path("/nowhere")])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (extension,) = setup_script.extension_options(strict=False)["ext_modules"]
    assert not [source for source in extension.sources if "cuda" in source]
    reason = f"torch {re.escape(torch.__version__)} is a CUDA build, but no CUDA toolkit, .*, in /nowhere"
    assert re.search(f"^tcurlora_ext: without CUDA kernels: {reason}", capsys.readouterr().out)
    with pytest.raises(SystemExit, match=f"without CUDA kernels, which TCURLORA_BUILD=1 asks for: {reason}"):
        setup_script.extension_options(strict=True)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("1", "without its C[+][+] extension, which TCURLORA_BUILD=1 asks for: no C[+][+] compiler was found"),
        ("yes", "TCURLORA_BUILD is 'yes', expected 0, 1 or nothing"),
        ("0", ""),
        ("", ""),
    ],
)
def test_a_missing_compiler_is_an_error_where_a_build_is_asked_for(
    asked: str, error: str, setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TCURLORA_BUILD", asked)
    if error:
        with pytest.raises(SystemExit, match=f"^tcurlora_ext: {error}"):
            setup_script.options()
    else:
        assert setup_script.options() == {}
