"""DoRA (Liu et al. 2024, arXiv 2402.09353) by PEFT: LoRA on the direction of each weight's rows, and their lengths."""

from __future__ import annotations

from typing import Any

from .base import Method, MethodOptions
from .by_peft import method_of


def _config(method: Method, options: MethodOptions, targets: list[str]) -> Any:
    from peft import LoraConfig

    rank = method.option(options, "rank")
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True)


# Not chosen by measurement: that of LoRA here.
METHOD = method_of("dora", "DoRA (PEFT)", 1e-2, "#00441b", _config, {"rank": 8}, True)
