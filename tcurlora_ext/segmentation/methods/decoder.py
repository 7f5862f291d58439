"""The decoder with the output head; the transformer stays as it is."""

from __future__ import annotations

from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task, load_trained, save_trained, train_only


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    train_only(model, spec.decoder)


# The better of 3e-3 and 1e-2 in 100 to 120 steps on embedded subjects.
METHOD = Method(
    "decoder", "decoder and head", _prepare, 1e-2, save_trained, load_trained, "#009e73", standard=True
)  # fmt: skip
