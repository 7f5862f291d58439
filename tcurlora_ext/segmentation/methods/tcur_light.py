"""tCUR with a core for every layer, which rides on the base product and costs next to no time."""

from __future__ import annotations

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task
from .tcur import load, options_over, prepare, save

CONFIG = tcur.TCURConfig.preset("light", alpha=2.0, orthonormal=True)


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prepare(METHOD, CONFIG, model, spec, options, task)


METHOD = Method(
    "tcur-light", "tCUR, a core for every layer", _prepare, 1e-2, save, load, "#cc79a7", adapter=True,
    options=options_over(CONFIG), merge=tcur.merge,
)  # fmt: skip
