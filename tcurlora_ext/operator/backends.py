"""Which implementations of the operator work here, and which one ``backend="auto"`` takes."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

NAMES = ("eager", "native", "triton")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works in this process (``bool(status)``), why not, or when it is chosen."""

    name: str
    works: bool
    reason: str

    def __bool__(self) -> bool:
        return self.works


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("tcurlora_ext._C"), ""
    except ModuleNotFoundError:
        return None, "the C++ extension was not built when this package was installed"
    except ImportError as error:  # built against another torch: a symbol is missing
        return None, f"the C++ extension does not load, install this package again ({error})"


def extension() -> ModuleType | None:
    """``tcurlora_ext._C``, which registers the operators when imported; None where it is not built or does not load."""
    return _load()[0]


def backends() -> dict[str, BackendStatus]:
    """The status of every backend. ``"auto"`` takes native on the CPU where it works, and eager everywhere else."""
    return {
        "eager": BackendStatus(
            "eager", True, "PyTorch operations; on every device, and the choice of 'auto' where no kernels are"
        ),
        "native": _native_status(),
        "triton": _extension_status(
            "triton", "tcurlora_ext.kernels", "the Triton kernels are not part of this installation"
        ),
    }


def _native_status() -> BackendStatus:
    built, reason = _load()
    if built is None:
        return BackendStatus("native", False, reason)
    about = built.build()
    kernels = ", ".join(about["kernels"])
    return BackendStatus(
        "native", True, f"C++ kernels ({kernels}) built with torch {about['torch']}; 'auto' on the CPU"
    )


def _extension_status(name: str, module: str, missing: str) -> BackendStatus:
    found = importlib.util.find_spec(module) is not None
    return BackendStatus(name, found, f"{module} is installed" if found else missing)


def resolve(backend: str) -> str:
    """What the operators registered from Python run: eager. ValueError or RuntimeError for what they cannot run."""
    if backend in ("auto", "eager"):
        return "eager"
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r} is unknown, expected 'auto' or one of {', '.join(NAMES)}")
    status = backends()[backend]
    if not status:
        raise RuntimeError(f"backend {backend!r} does not work here: {status.reason}; use 'auto' or 'eager'")
    return backend
