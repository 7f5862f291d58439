"""tCUR with a core for every layer, which rides on the base product and costs next to no time."""

from __future__ import annotations

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task
from .tcur import inject, load, save


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    chosen = {name: METHOD.option(options, name) for name in METHOD.options}
    inject(model, tcur.TCURConfig.preset("light", seed=options.seed, **chosen), spec, options)


METHOD = Method(
    "tcur-light", "tCUR, a core for every layer", _prepare, 1e-2, save, load, "#cc79a7", adapter=True,
    options={"rank": 32, "alpha": 2.0, "orthonormal": True}, merge=tcur.merge,
)  # fmt: skip
