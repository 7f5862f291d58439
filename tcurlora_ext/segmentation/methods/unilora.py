"""Uni-LoRA (arXiv 2506.00799) by PEFT: the entries of all layers' A and B are drawn from one trained vector.

The vector is random at the start, because at zero it would have no gradient: the output is that of the base only
nearly. Which entry is which follows from the run's seed, which the file holds.
"""

from __future__ import annotations

from typing import Any

from .base import Method, MethodOptions
from .by_peft import method_of


def _config(method: Method, options: MethodOptions, targets: list[str]) -> Any:
    from peft import UniLoraConfig

    return UniLoraConfig(
        r=method.option(options, "rank"), theta_d_length=method.option(options, "length"), target_modules=targets,
        proj_seed=options.seed,
    )  # fmt: skip


# Not chosen by measurement: that of LoRA here. The rank is PEFT's default; the length is the number of parameters that
# tCUR of rank 8 trains in the network `vit`.
METHOD = method_of(
    "unilora", "Uni-LoRA (PEFT)", 1e-2, "#4d4d4d", _config, {"rank": 4, "length": 2304}
)  # fmt: skip
