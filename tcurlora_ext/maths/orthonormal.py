"""Orthonormal columns, bit for bit the same on every machine and with every number of threads.

A library's QR sums in an order that depends on the processor and on the number of threads, so that factors computed
again elsewhere differ in their last bits, and so do the outputs of a model. Here the only long sums are those of a Gram
matrix, taken over integers so small that every partial sum is exact in float64, whatever the order. The rest is a
Cholesky factorisation of (k, k) and a triangular solve, written out in operations that IEEE 754 rounds one by one.

The columns of X are those of Q in the same order: ``Q = X T`` with T upper triangular and its diagonal positive, the Q
of a QR factorisation with a positive diagonal. The first j columns of Q depend on the first j columns of X alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transforms import SliceTransform

# A column whose part orthogonal to those before it is shorter than this, relative to the column, is dependent on them:
# the Gram matrix, exact to about 2^-40, does not tell that part from zero.
DEPENDENT = 1e-5


def orthonormal_columns(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormalise the columns of a matrix, in order.

    Args:
        X: (n, k) with k <= n, float64, finite.

    Returns:
        Q (n, k) and T (k, k) with ``Q = X T``, float64 on the device of X. Q is orthonormal to about 1e-12.

    Raises:
        ValueError: A column is zero or depends on those before it; the message has its number.
    """
    T = _triangle(X)
    Q = _times(X, T)
    again = _triangle(Q)  # the first pass is orthonormal to 2^-40 times the square of X's condition
    return _times(Q, again), _times(T, again)


def orthonormal_blocks(blocks: Tensor, along: SliceTransform, slices: int) -> tuple[Tensor, Tensor]:
    """Orthonormalise the columns of a factor at every frequency of its slice transform.

    The two coupled blocks of a pair are the real and the imaginary part of one complex matrix, whose columns become
    unitary. A unitary column at a frequency below S/2 has norm sqrt(2) in the two blocks: it stands for the conjugate
    frequency too.

    Args:
        blocks: (B, n, k), the first B blocks of the orthonormal transform of a factor (S, n, k).
        along: The transform.
        slices: S.

    Returns:
        The blocks (B, n, k) of Q and (B, k, k) of T, float64. At every frequency the orthonormal spectrum of Q is the
        product of those of the factor and of T.

    Raises:
        ValueError: A column is zero or depends on those before it; the message has its number.
    """
    blocks = blocks.double()
    Q, T = torch.empty_like(blocks), blocks.new_empty(len(blocks), blocks.shape[2], blocks.shape[2])
    pairs = along.pair_blocks(slices)
    paired = range(len(blocks))[pairs]
    for at in (at for at in range(len(blocks)) if at not in paired):
        Q[at], T[at] = orthonormal_columns(blocks[at])
    for at in paired[::2]:
        # A complex matrix as a real one: each column z as the two columns (Re z, Im z) and (-Im z, Re z).
        real, imaginary = blocks[at], blocks[at + 1]
        columns = torch.stack([torch.cat([real, imaginary]), torch.cat([-imaginary, real])], 2).flatten(1)
        made, triangle = orthonormal_columns(columns)
        parts = math.sqrt(2) * made[:, ::2].unflatten(0, (2, -1))
        Q[at], Q[at + 1] = parts[0], parts[1]
        T[at], T[at + 1] = 2 * triangle[::2, ::2], 2 * triangle[1::2, ::2]
    return Q, T


def _triangle(X: Tensor) -> Tensor:
    """T (k, k), upper triangular, such that the columns of ``X T`` are orthonormal."""
    gram = _exact_gram(X).tolist()
    size = len(gram)
    # Cholesky: gram = L L^T, row by row, in Python's floats.
    L = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = gram[i][j]
            for k in range(j):
                rest -= L[i][k] * L[j][k]
            if i > j:
                L[i][j] = rest / L[j][j]
            elif rest > DEPENDENT**2 * gram[i][i]:
                L[i][i] = math.sqrt(rest)
            else:
                raise ValueError(f"column {i} is zero or depends on the columns before it")
    # T = L^-T: column j solves L^T t = e_j.
    T = [[0.0] * size for _ in range(size)]
    for j in range(size):
        T[j][j] = 1 / L[j][j]
        for i in range(j - 1, -1, -1):
            total = 0.0
            for k in range(i + 1, j + 1):
                total += L[k][i] * T[k][j]
            T[i][j] = -total / L[i][i]
    return torch.tensor(T, dtype=torch.float64, device=X.device)


def _exact_gram(X: Tensor) -> Tensor:
    """``X^T X`` of (n, k), exact in its sums: X is split into two integer parts whose products add without rounding."""
    largest = X.abs().amax(0)
    if bool((largest == 0).any()):
        raise ValueError(f"column {int((largest == 0).nonzero()[0])} is zero")
    exponent = torch.frexp(largest).exponent.to(X.dtype)  # powers of two: scaling by them does not round
    bits = (52 - math.ceil(math.log2(len(X) + 1))) // 2
    scaled = torch.ldexp(X, bits - exponent)
    high = scaled.round()
    low = torch.ldexp(scaled - high, torch.tensor(float(bits), dtype=X.dtype, device=X.device)).round()
    cross = high.T @ low
    total = high.T @ high + torch.ldexp(cross + cross.T, torch.tensor(float(-bits), dtype=X.dtype, device=X.device))
    return torch.ldexp(torch.ldexp(total, exponent - bits), (exponent - bits)[:, None])


def _times(X: Tensor, T: Tensor) -> Tensor:
    """``X T`` with T upper triangular, in one order of operations."""
    columns = []
    for j in range(T.shape[1]):
        column = X[:, 0] * T[0, j]
        for i in range(1, j + 1):
            column = column + X[:, i] * T[i, j]
        columns.append(column)
    return torch.stack(columns, 1)
