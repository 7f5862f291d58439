"""CURLoRA (Fawi 2024, arXiv 2408.14572): a core of its own for each layer, over columns and rows of its weight.

Columns and rows are drawn with probabilities inverse to their squared norms, by the run's seed, and the core begins at
zero. The released code does not save which were drawn, so its adapters cannot be read back; here the file holds their
indices, and columns and rows are taken from the base again. A fused projection is one layer.

With ``raw=true`` columns and rows enter as they are, which is the paper's form: they tend to be the shortest of each
weight, so that its steps are small at a usual learning rate. By default they have unit norm and tCUR's scale rule sets
the size of a step; alpha multiplies it.
"""

from __future__ import annotations

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task
from .tcur import inject, load, save


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    config = tcur.TCURConfig(
        rank=METHOD.option(options, "rank"), stack_by="none", transform="identity", split_fused={},
        selection="inverse-norm", seed=options.seed, alpha=METHOD.option(options, "alpha"),
        scale=1.0 if METHOD.option(options, "raw") else None,
    )  # fmt: skip
    inject(model, config, spec, options)


# Not chosen by measurement: that of tCUR here.
METHOD = Method(
    "curlora", "CURLoRA, a core for every layer", _prepare, 1e-2, save, load, "#ff7f7f", adapter=True,
    options={"rank": 8, "alpha": 1.0, "raw": False}, merge=tcur.merge,
)  # fmt: skip
