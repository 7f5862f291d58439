"""Names of the variants that are compared: what the column ``variant`` of every result file holds.

The operator's variants are named after its backends, "tcur eager", "tcur native", ..., and come from the registry of
backends: one that is added there is measured, tabulated and drawn without an edit here.
"""

from __future__ import annotations

from tcurlora_ext.operator.backends import BACKENDS
from tcurlora_ext.operator.backends.eager import EAGER

FROZEN = "frozen"  # the baseline of every ratio
LORA = "lora"  # of rank q = r S
PAPER_RANK = 32  # of the LoRA that the paper compares with
PAPER_LORA = f"peft lora r={PAPER_RANK}"
DENSE, TRANSIENT, STACK = "tcur dense layer", "tcur transient", "tcur dense stack"
CURLORA = "curlora dense"
# Adapters with a core for each layer, of ranks that do not depend on the case's: they ride on the base product.
LIGHT_RANKS = (8, 32)
OWN_CORE = f"tcur own core r={LIGHT_RANKS[0]}"  # the same adapter in the ordinary form
SMALL_LORA = f"peft lora r={LIGHT_RANKS[0]}"


def light_variants() -> dict[str, int]:
    """Variant -> the rank of its adapter, which rides on the base product."""
    return {f"tcur light r={rank}": rank for rank in LIGHT_RANKS}


def operator_variants() -> dict[str, str]:
    """Variant -> the backend that runs the operator in it, for every registered backend in the registry's order."""
    return {f"tcur {backend}": backend for backend in BACKENDS}


def kernel_variants() -> dict[str, str]:
    """Those of :func:`operator_variants` whose backend has kernels of its own: all but PyTorch operations."""
    return {variant: backend for variant, backend in operator_variants().items() if backend != EAGER.name}
