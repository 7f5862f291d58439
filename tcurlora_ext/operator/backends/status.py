"""What users are told about the backends: which work on this machine, which one ``"auto"`` chooses, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choice import choices
from .registry import BACKENDS


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works on any device of this machine: ``bool(status)``.

    Attributes:
        name: ``"eager"``, ``"native"`` or ``"triton"``.
        works: Whether it works on at least one device.
        reason: On which devices it works and for which calls ``"auto"`` takes it; or why it does not work.
    """

    name: str
    works: bool
    reason: str

    def __bool__(self) -> bool:
        return self.works


def devices() -> list[torch.device]:
    """The devices of this machine for which "auto" has rules."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def backends() -> dict[str, BackendStatus]:
    """The implementations of the operator, and which of them work on this machine.

    ``"eager"`` uses PyTorch operations, ``"native"`` C++ on the CPU and CUDA C++ on a GPU, ``"triton"`` Triton kernels.

    Returns:
        Name -> status; ``status.reason`` says on which devices ``"auto"`` takes this backend and why. The environment
        variable ``TCURLORA_BACKEND`` names a backend that ``"auto"`` takes in all cases.
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
