"""``tcurlora::linear`` written out in functional PyTorch operations, with no operator of this package in it.

What other machinery can take apart: an exporter, which knows PyTorch's operations alone, and ``torch.func``, whose
transforms (vmap, grad, jvp and all that is made of them) need a rule for every operation. Autograd keeps more for it
than for the operator, and a sum more is written and read: training goes through the operator.
"""

from __future__ import annotations

from torch import Tensor, nn

from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.middle import BatchedMiddle

from .checks import check_slices


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, phases: tuple[Tensor, ...] | None = None
) -> Tensor:
    """The result of ``torch.ops.tcurlora.linear``, whatever the backend.

    ``phases`` are the constants of the middle product (``phases_on`` of :mod:`tcurlora_ext.maths.transforms.base`) for
    a caller that holds them, as an exported graph has to: it would compute them in each call. Raises ValueError where
    the slices are not in the core; what else does not fit is PyTorch's to refuse.
    """
    return nn.functional.linear(x, weight, bias) + delta(x, factors, phases)


def delta(x: Tensor, factors: Factors, phases: tuple[Tensor, ...] | None = None) -> Tensor:
    """The adapter's part of :func:`linear` alone: ``scale * m col^T``, (..., in) -> (..., num_slices*out)."""
    check_slices(factors)
    h = x.reshape(-1, x.shape[-1]) @ factors.row.T
    m = BatchedMiddle(factors, h.dtype, phases).forward(h)
    return (m.flatten(0, 1) @ factors.col.T).reshape(*x.shape[:-1], factors.num_slices * factors.col.shape[0])
