"""The versions of installed packages, and of this one."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The version of a package; "" where it is not installed as one.

    Of this package it is that of the code which runs: the metadata of a checkout may be of an older one, or missing.

    Args:
        package: Its name in package indices.
    """
    if package == "tcurlora_ext":
        return str(sys.modules[package].__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
