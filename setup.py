"""Builds ``tcurlora_ext._C``, the operators in C++, where torch and a C++ compiler are; the rest is in pyproject.toml.

Without them the package installs all the same, computes in PyTorch operations, and says so here once.
TCURLORA_BUILD=0 in the environment leaves the extension out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

WITHOUT = "tcurlora_ext: without its C++ extension"

options: dict[str, Any] = {}
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    print(f"{WITHOUT}: {error}. With torch installed, `pip install --no-build-isolation .` builds it.")
else:

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        """A build whose failure leaves the pure-Python package."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # a missing compiler, its errors and ninja's have no common base
                print(f"{WITHOUT}: {error}")

    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    extension = CppExtension("tcurlora_ext._C", sources, extra_compile_args=["-O3", "-fvisibility=hidden"])
    extension.optional = True
    if os.environ.get("TCURLORA_BUILD") != "0":
        options = {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}

setup(**options)
