"""The output head alone: what every adapter is compared with."""

from __future__ import annotations

from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task, load_trained, save_trained, train_only


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    train_only(model, spec.head)


# The best of 1e-3, 1e-2, 3e-2 and 1e-1 in 100 to 120 steps on embedded subjects.
METHOD = Method(
    "head", "output head alone", _prepare, 1e-1, save_trained, load_trained, "#7f7f7f", standard=True
)  # fmt: skip
