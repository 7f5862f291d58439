"""What a user sees of the backends: which work here, which one ``backend="auto"`` takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choice import choices
from .registry import BACKENDS


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works on a device of this machine: ``bool(status)``.

    Attributes:
        name: ``"eager"``, ``"native"`` or ``"triton"``.
        works: Whether it does.
        reason: Where, and when ``"auto"`` takes it; or why it does not work.
    """

    name: str
    works: bool
    reason: str

    def __bool__(self) -> bool:
        return self.works


def devices() -> list[torch.device]:
    """The devices of this machine that "auto" has rules for."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def backends() -> dict[str, BackendStatus]:
    """The implementations of the operator, and which of them work here.

    ``"eager"`` is PyTorch's operations, ``"native"`` C++ on the CPU and CUDA C++ on a GPU, ``"triton"`` Triton kernels.

    Returns:
        Name -> status, with where and why ``"auto"`` takes it. The variable ``TCURLORA_BACKEND`` in the environment of
        a process names one that ``"auto"`` takes instead.
    """
    return {name: _status(name) for name in BACKENDS}


def _status(name: str) -> BackendStatus:
    backend = BACKENDS[name]
    reasons = {device: backend.missing(device.type) for device in devices()}
    works = [device for device, reason in reasons.items() if not reason]
    if not works:
        return BackendStatus(name, False, reasons[torch.device("cpu")])
    chosen = [f"on {device} {rule}" for device in works for rule in choices(device).rules if rule.backend == name]
    where = f"{backend.description()} on {', '.join(map(str, works))}"
    return BackendStatus(name, True, f"{where}; 'auto' takes {'; '.join(chosen) or 'it nowhere'}")
