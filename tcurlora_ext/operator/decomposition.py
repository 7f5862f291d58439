"""``tcurlora::linear`` as functional PyTorch operations, without an operator of this package.

Two users need this form: exporters, which support PyTorch operations alone, and ``torch.func``, whose transforms (vmap,
grad, jvp and what builds on them) need a rule for every operation. Training uses the operator instead: here autograd
saves more tensors, and the sum of base and delta is one more pass over memory.
"""

from __future__ import annotations

from torch import Tensor, nn

from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.middle import BatchedMiddle

from .checks import check_slices


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, phases: tuple[Tensor, ...] | None = None
) -> Tensor:
    """Compute what ``torch.ops.tcurlora.linear`` computes.

    ``phases`` are the constants of the middle product, from ``phases_on`` of
    :mod:`tcurlora_ext.maths.transforms.base`. An exported graph has to hold them as buffers: it would otherwise compute
    them in each call. Raises ValueError where the slices are not in the core; PyTorch raises for all other arguments
    that do not fit.
    """
    return nn.functional.linear(x, weight, bias) + delta(x, factors, phases)


def delta(x: Tensor, factors: Factors, phases: tuple[Tensor, ...] | None = None) -> Tensor:
    """The delta of :func:`linear` alone, ``scale * m col^T``: (..., in) -> (..., num_slices*out)."""
    check_slices(factors)
    h = x.reshape(-1, x.shape[-1]) @ factors.row.T
    m = BatchedMiddle(factors, h.dtype, phases).forward(h)
    return (m.flatten(0, 1) @ factors.col.T).reshape(*x.shape[:-1], factors.num_slices * factors.col.shape[0])
