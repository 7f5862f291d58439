"""The product of every token with its own adapter's matrix, and its gradients.

Shapes: G groups, T tokens, D adapters; vectors h (G, T, v*k), v of length k for each token and group; matrices
(G, D, p, k). All are in one dtype of at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Blocks


def mixed(h: Tensor, matrices: Tensor, plan: Blocks, vectors: int = 1) -> Tensor:
    """Every vector of a token times its adapter's matrix, zero for tokens of the base: (G, T, v*p).

    Args:
        h: (G, T, v*k).
        matrices: (G, D, p, k), any strides.
        plan: Which tokens have which adapter, as blocks.
        vectors: v.
    """
    products = torch.bmm(_single(plan.spread(h), vectors), plan.of_blocks(matrices).mT)
    return plan.collect(products.view(-1, plan.size, vectors * products.shape[-1]), h.shape[1])


def mixed_back(
    g: Tensor, h: Tensor | None, matrices: Tensor | None, plan: Blocks, adapters: int, vectors: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`mixed`: of h where the matrices are given, and of the matrices where h is given.

    Args:
        g: The gradient of the result, (G, T, v*p).
        h, matrices, plan, vectors: As there, or None.
        adapters: D.
    """
    blocks = _single(plan.spread(g), vectors)
    dh = dmatrices = None
    if matrices is not None:
        products = torch.bmm(blocks, plan.of_blocks(matrices))
        dh = plan.collect(products.view(-1, plan.size, vectors * products.shape[-1]), g.shape[1])
    if h is not None:
        h_blocks = _single(plan.spread(h), vectors)
        # An outer product of each token: as a batched product it takes eight times as long.
        products = blocks.mT * h_blocks if h_blocks.shape[1] == 1 else torch.bmm(blocks.mT, h_blocks)
        dmatrices = plan.sum_by_adapter(products, adapters)
    return dh, dmatrices


def _single(blocks: Tensor, vectors: int) -> Tensor:
    """The vectors of blocks of tokens one below the other: (G*blocks, size, v*k) -> (G*blocks, size*v, k)."""
    return blocks.reshape(len(blocks), -1, blocks.shape[-1] // vectors)
