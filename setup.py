"""Builds ``tcurlora_ext._C``, the operators in C++ and CUDA; all other settings of the package are in pyproject.toml.

C++      is built if torch and a C++ compiler are installed. An isolated build uses the torch of the environment that
         pip installs into, so that the extension fits it. Only without one does the build require torch itself.
CUDA     is built if that torch is a CUDA build and CUDA_HOME is set or nvcc is on the PATH; no GPU is needed.
         Architectures are those in TORCH_CUDA_ARCH_LIST, by default those below.

Without them the package is installed all the same and computes in PyTorch operations; the build prints a message.
With TCURLORA_BUILD=0 in the environment the extension is not built.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

WITHOUT = "tcurlora_ext: without its C++ extension"
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


def extension_options() -> dict[str, Any]:
    """The arguments for ``setup`` that build the extension with the installed torch."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    cpu = CppExtension(
        "tcurlora_ext._C",
        sources("csrc", "csrc/cpu"),
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP},
        extra_link_args=OPENMP,
    )
    forms = [("its C++ extension", cpu)]
    if torch.version.cuda and CUDA_HOME:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cuda = CUDAExtension(
            "tcurlora_ext._C",
            sources("csrc", "csrc/cpu") + sources("csrc/cuda", suffixes=(".cpp", ".cu")),
            define_macros=[("TCURLORA_CUDA", None), ("TCURLORA_CUDA_ARCHITECTURES", f'"{architectures}"')],
            extra_compile_args={"cxx": CXX_FLAGS + OPENMP, "nvcc": ["-O3"]},
            extra_link_args=OPENMP,
        )
        forms.insert(0, ("CUDA kernels", cuda))
    elif torch.version.cuda:
        print("tcurlora_ext: without CUDA kernels: this torch is a CUDA build, but no CUDA_HOME and no nvcc was found")

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        """A build that on errors falls back to one without CUDA, and then to the pure-Python package."""

        def build_extensions(self) -> None:
            (extension,) = self.extensions
            for part, form in forms:
                vars(extension).update(vars(form))
                try:
                    return super().build_extensions()
                except Exception as error:  # errors of compilers and of ninja have no narrower common base class
                    print(f"tcurlora_ext: without {part}: {error}")
            return None

    extension = CppExtension("tcurlora_ext._C", forms[0][1].sources)
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


options: dict[str, Any] = {}
if os.environ.get("TCURLORA_BUILD") == "0":
    print(f"{WITHOUT}: TCURLORA_BUILD=0")
elif not has_compiler():
    print(f"{WITHOUT}: no C++ compiler was found (c++, or what CXX names)")
elif not has_torch():
    # pip then installs these for the isolated build and runs this file again.
    options = {"setup_requires": ["torch", "ninja"]}
else:
    options = extension_options()

setup(**options)
