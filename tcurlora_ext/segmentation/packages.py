"""Packages of the segmentation extra, asked for where they are first needed."""

from __future__ import annotations

import importlib.util


def require_package(module: str) -> None:
    """ModuleNotFoundError with the command to run where `module` of the segmentation extra is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the package '{module}' is not installed; expected it for segmentation: "
            "pip install 'tcurlora_ext[segmentation]'",
            name=module,
        )
