"""The packages of the extra `segmentation`: an error with the command that installs them where one is missing."""

from __future__ import annotations

import importlib.util


def require_package(module: str) -> None:
    """Raise ModuleNotFoundError, with the command that installs the extra, unless `module` is installed."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the package '{module}' is not installed; expected it for segmentation: "
            "pip install 'tcurlora_ext[segmentation]'",
            name=module,
        )
