"""CPS, the form of HyPS (arXiv 2409.00884) whose parallel branch is a LoRA in place of the weight's principal part.

    y = W x + B A x + bias,   A random, B zero at the start
    output = y + up(ReLU(down(y)))

The released code (github.com/WangangCheng/HyPS, read in November 2026) puts the bottleneck on W x + bias, not on the
sum, and its ReLU is on the zero weight of `up`, so that its serial branch has no gradient. Here both branches train,
and the output starts as that of the base.
"""

from __future__ import annotations

from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task, load_trained, saves_as
from .hyps import prepare


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prepare(model, spec, options, METHOD, split=False)


# Not chosen by measurement: the authors' released code has 5e-4; this lies between it and that of LoRA here.
METHOD = Method(
    "cps", "CPS: LoRA and serial bottlenecks", _prepare, 3e-3, saves_as("cps"), load_trained, "#bf00bf",
    adapter=True, options={"rank": 8, "width": 8},
)  # fmt: skip
