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
def extension() -> ModuleType | None:
    """``tcurlora_ext._C``, which registers the operators when imported; None where it is not built."""
    try:
        return importlib.import_module("tcurlora_ext._C")
    except ModuleNotFoundError:
        return None


def backends() -> dict[str, BackendStatus]:
    """The status of every backend. ``"auto"`` takes the first that works of triton, native, eager."""
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
    built = extension()
    if built is None:
        return BackendStatus("native", False, "the C++ extension was not built when this package was installed")
    about = built.build()
    return BackendStatus(
        "native",
        True,
        f"C++ kernels for {', '.join(about['kernels'])}, built with torch {about['torch']}; 'auto' on CPU",
    )


def _extension_status(name: str, module: str, missing: str) -> BackendStatus:
    found = importlib.util.find_spec(module) is not None
    return BackendStatus(name, found, f"{module} is installed" if found else missing)


def resolve(backend: str) -> str:
    """The backend to run: "auto" becomes a name of :data:`NAMES`. ValueError or RuntimeError where it cannot be."""
    if backend in ("auto", "eager"):
        return "eager"
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r} is unknown, expected 'auto' or one of {', '.join(NAMES)}")
    status = backends()[backend]
    if not status:
        raise RuntimeError(f"backend {backend!r} does not work here: {status.reason}; use 'auto' or 'eager'")
    return backend
