"""Builds ``tcurlora_ext._C``, the operators in C++ and CUDA; all other settings of the package are in pyproject.toml.

C++      is built if torch and a C++ compiler are installed. An isolated build uses the torch of the environment that
         pip installs into, so that the extension fits it. Only without one does the build require torch itself.
CUDA     is built if that torch is a CUDA build and a CUDA toolkit is found (``cuda_folders``); no GPU is needed.
         Architectures are those in TORCH_CUDA_ARCH_LIST, by default those below.

The environment variable TCURLORA_BUILD says what happens where a part cannot be built:

not set  The package is installed all the same, without CUDA kernels or in pure Python, and the build prints a message.
0        The extension is not built at all.
1        All that the installed torch can have is built, or the build ends with an error: the CUDA kernels for a CUDA
         build of torch, the C++ extension for any other. A missing compiler or toolkit is an error too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

PACKAGE = "tcurlora_ext"
WITHOUT = f"{PACKAGE}: without its C++ extension"
VARIABLE = "TCURLORA_BUILD"
# Ampere, Hopper and Blackwell, with PTX of the last for later GPUs.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden"]
# at::parallel_for uses OpenMP in torch for Linux; without this flag the kernels would run on one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def has_torch() -> bool:
    """Whether torch can be imported. An isolated build also finds it in the environment that pip installs into."""
    if find_spec("torch") is None:
        # pip hides the environment's packages from an isolated build but keeps its prefix. They are appended to the
        # path, so that the build's own packages come first.
        sys.path += [path for name in ("purelib", "platlib") if (path := sysconfig.get_path(name)) not in sys.path]
    return find_spec("torch") is not None


def has_compiler() -> bool:
    return shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is not None


def sources(*folders: str, suffixes: tuple[str, ...] = (".cpp",)) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path(folder).iterdir() if path.suffix in suffixes)


def cuda_folders() -> list[Path]:
    """Where a CUDA toolkit may be, in the order in which the folders are tried.

    CUDA_HOME or CUDA_PATH; the folder above that of the nvcc on the PATH; the folder that this nvcc names itself, since
    the one on the PATH may be a script that calls another; /usr/local/cuda.
    """
    found = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        found.append(Path(nvcc).parents[1])
        # A dry run reads no file and writes to stderr what nvcc would do, its own folder first: "#$ TOP=/.../bin/..".
        dry_run = subprocess.run([nvcc, "--dryrun", "-E", "none.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.M)
        if top is not None:
            found.append(Path(top[1].strip()).resolve())
    return list(dict.fromkeys([*found, Path("/usr/local/cuda")]))


def is_toolkit(folder: Path) -> bool:
    """Whether a folder has a compiler and headers. conda has the headers in a folder for each target."""
    headers = [folder / "include" / "cuda_runtime.h", *folder.glob("targets/*/include/cuda_runtime.h")]
    has_nvcc = shutil.which("nvcc", path=str(folder / "bin")) is not None
    return has_nvcc and any(header.exists() for header in headers)


def find_cuda() -> tuple[Path | None, str]:
    """The folder of the CUDA toolkit, None where there is none, and a text that names the folders that were tried."""
    tried: list[Path] = []
    for folder in cuda_folders():
        tried.append(folder)
        if is_toolkit(folder):
            return folder, f"CUDA toolkit: {folder} (tried {', '.join(map(str, tried))})"
    return None, f"no CUDA toolkit, bin/nvcc and include/cuda_runtime.h, in {', '.join(map(str, tried))}"


def give_up(strict: bool, without: str, reason: object) -> None:
    """Say that something is not built and why; where TCURLORA_BUILD=1 asks for it, end with that as an error."""
    if strict:
        raise SystemExit(f"{without}, which {VARIABLE}=1 asks for: {reason}")
    print(f"{without}: {reason}")


def extension_options(strict: bool) -> dict[str, Any]:
    """The arguments for ``setup`` that build the extension with the installed torch."""
    import torch
    from torch.utils import cpp_extension

    cpu = cpp_extension.CppExtension(
        "tcurlora_ext._C",
        sources("csrc", "csrc/riding", "csrc/cpu"),
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP},
        extra_link_args=OPENMP,
    )
    forms = [("its C++ extension", cpu)]
    cuda_home, searched = find_cuda() if torch.version.cuda else (None, "")
    if cuda_home is not None:
        print(f"{PACKAGE}: {searched}")
        # torch guesses this folder when it is imported, by the place of nvcc alone, and reads it when it builds.
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(cuda_home)
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cuda = cpp_extension.CUDAExtension(
            "tcurlora_ext._C",
            sources("csrc", "csrc/riding", "csrc/cpu") + sources("csrc/cuda", suffixes=(".cpp", ".cu")),
            define_macros=[("TCURLORA_CUDA", None), ("TCURLORA_CUDA_ARCHITECTURES", f'"{architectures}"')],
            extra_compile_args={"cxx": CXX_FLAGS + OPENMP, "nvcc": ["-O3"]},
            extra_link_args=OPENMP,
        )
        forms.insert(0, ("CUDA kernels", cuda))
    elif torch.version.cuda:
        give_up(
            strict, f"{PACKAGE}: without CUDA kernels", f"torch {torch.__version__} is a CUDA build, but {searched}"
        )

    class OptionalBuild(cpp_extension.BuildExtension):  # type: ignore[misc]
        """A build that on errors falls back to one without CUDA, and then to the pure-Python package."""

        def build_extensions(self) -> None:
            (extension,) = self.extensions
            for part, form in forms:
                vars(extension).update(vars(form))
                try:
                    return super().build_extensions()
                except Exception as error:  # errors of compilers and of ninja have no narrower common base class
                    give_up(strict, f"{PACKAGE}: without {part}", error)
            extension.optional = True  # there is no file to copy
            return None

    extension = cpp_extension.CppExtension("tcurlora_ext._C", forms[0][1].sources)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


def options() -> dict[str, Any]:
    """The arguments for ``setup``: what is built, by TCURLORA_BUILD and by what is installed."""
    build = os.environ.get(VARIABLE, "")
    if build not in ("", "0", "1"):
        raise SystemExit(f"{PACKAGE}: {VARIABLE} is {build!r}, expected 0, 1 or nothing")
    if build == "0":
        print(f"{WITHOUT}: {VARIABLE}=0")
        return {}
    if not has_compiler():
        give_up(build == "1", WITHOUT, "no C++ compiler was found (c++, or what CXX names)")
        return {}
    if not has_torch():
        # pip then installs these for the isolated build and runs this file again.
        return {"setup_requires": ["torch", "ninja"]}
    return extension_options(build == "1")


if __name__ == "__main__":
    setup(license="Apache-2.0", **options())
