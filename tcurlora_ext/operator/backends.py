"""Which implementations of the operator work here, and which one ``backend="auto"`` takes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

NAMES = ("eager", "native", "triton")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works in this process (``bool(status)``), why not, or when it is chosen."""

    name: str
    works: bool
    reason: str

    def __bool__(self) -> bool:
        return self.works


def backends() -> dict[str, BackendStatus]:
    """The status of every backend. ``"auto"`` takes the first that works of triton, native, eager."""
    return {
        "eager": BackendStatus("eager", True, "PyTorch operations; works on every device and is the choice of 'auto'"),
        "native": _extension_status("native", "tcurlora_ext._C", "the C++ extension is not part of this installation"),
        "triton": _extension_status(
            "triton", "tcurlora_ext.kernels", "the Triton kernels are not part of this installation"
        ),
    }


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
