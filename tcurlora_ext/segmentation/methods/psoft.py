"""PSOFT by PEFT: an orthogonal matrix within the principal subspace of each weight, with two scaling vectors.

Its source is "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", openreview.net/forum?id=FSHrinMArK.
dW = B (R - I) A with frozen B A, the principal part of W. PEFT computes the SVD again when a file is read.
"""

from __future__ import annotations

from typing import Any

from .base import Method, MethodOptions
from .by_peft import method_of


def _config(method: Method, options: MethodOptions, targets: list[str]) -> Any:
    from peft import PsoftConfig

    rank = method.option(options, "rank")
    return PsoftConfig(r=rank, psoft_alpha=rank, target_modules=targets)


# Not chosen by measurement: that of LoRA here. The rank is PEFT's default.
METHOD = method_of("psoft", "PSOFT (PEFT)", 1e-2, "#c2a5cf", _config, {"rank": 32})
