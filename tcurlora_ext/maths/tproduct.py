"""The t-product algebra of third-order tensors, slices first.

A tensor of shape (S, m, n) is S frontal slices of shape (m, n). The t-product ``A * B`` convolves the slices
circularly, ``(A * B)_l = sum_{i + j = l mod S} A_i B_j``, which a DFT along the slices turns into one matrix product
per frequency. Source: Kilmer and Martin, "Factorization strategies for third-order tensors", 2011.

Real tensors give real results: only the frequencies 0..S//2 are computed, the others are their conjugates. Tensors are
float32 or float64, on any device, and differentiable where PyTorch's operations are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TSVD(NamedTuple):
    """The result of :func:`tsvd`, with ``A = U * S * ttranspose(V)`` and k = min(m, n).

    Attributes:
        U: (S, m, k), with orthonormal columns in every frequency.
        S: (S, k, k), diagonal in every frequency.
        V: (S, n, k), with orthonormal columns in every frequency.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected three dimensions (slices, rows, columns)")


def _half_spectrum(tensor: Tensor) -> Tensor:
    # rfft leaves the frequency as the innermost dimension in memory, for which a batched product is 25 times slower.
    return torch.fft.rfft(tensor, dim=0).contiguous()


def _from_half_spectrum(spectrum: Tensor, slices: int) -> Tensor:
    return torch.fft.irfft(spectrum, n=slices, dim=0)


def dft_slices(tensor: Tensor) -> Tensor:
    """DFT along the slices, unnormalised.

    Args:
        tensor: (S, m, n), real or complex.

    Returns:
        (S, m, n) complex, frequencies 0..S-1.

    Raises:
        ValueError: Not three dimensions.
    """
    _check("tensor", tensor)
    return torch.fft.fft(tensor, dim=0)


def tprod(a: Tensor, b: Tensor) -> Tensor:
    """The t-product a * b of real tensors.

    Args:
        a: (S, m, p).
        b: (S, p, n).

    Returns:
        (S, m, n) in their dtype.

    Raises:
        ValueError: Not three dimensions, or shapes that do not fit.
    """
    _check("a", a)
    _check("b", b)
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} have no t-product: expected (S, m, p) and (S, p, n)"
        )
    return _from_half_spectrum(_half_spectrum(a) @ _half_spectrum(b), a.shape[0])


def ttranspose(a: Tensor) -> Tensor:
    """The t-transpose: every slice transposed, slices 1..S-1 in reverse order.

    Args:
        a: (S, m, n).

    Returns:
        (S, n, m).

    Raises:
        ValueError: Not three dimensions.
    """
    _check("a", a)
    return torch.cat([a[:1], a[1:].flip(0)]).transpose(1, 2)


def tpinv(a: Tensor, rtol: float | None = None) -> Tensor:
    """The t-pseudo-inverse of a real tensor: the Moore-Penrose inverse of every frequency.

    Args:
        a: (S, m, n).
        rtol: Cut-off for singular values, relative to the largest of the same frequency. None: the default of
            :func:`torch.linalg.pinv`, max(m, n) times the machine epsilon.

    Returns:
        (S, n, m).

    Raises:
        ValueError: Not three dimensions.
    """
    _check("a", a)
    return _from_half_spectrum(torch.linalg.pinv(_half_spectrum(a), rtol=rtol), a.shape[0])


def tsvd(a: Tensor) -> TSVD:
    """The reduced t-SVD of a real tensor: one SVD per frequency.

    In a self-conjugate frequency (0, and S/2 for even S) the spectrum is real and so are its factors, which keeps all
    three results real.

    Args:
        a: (S, m, n).

    Returns:
        The three factors.

    Raises:
        ValueError: Not three dimensions.
    """
    _check("a", a)
    slices = a.shape[0]
    spectrum = _half_spectrum(a)
    left, values, right_h = torch.linalg.svd(spectrum, full_matrices=False)
    for k in self_conjugate_frequencies(slices):
        u, s, vh = torch.linalg.svd(spectrum[k].real, full_matrices=False)
        left[k], values[k], right_h[k] = u.to(left.dtype), s, vh.to(right_h.dtype)
    return TSVD(
        U=_from_half_spectrum(left, slices),
        S=_from_half_spectrum(torch.diag_embed(values).to(left.dtype), slices),
        V=_from_half_spectrum(right_h.mH, slices),
    )


def self_conjugate_frequencies(slices: int) -> list[int]:
    """The frequencies k with k = -k (mod S), at which the spectrum of real slices is real.

    Args:
        slices: S, the number of slices.

    Returns:
        [0], or [0, S/2] for even S.
    """
    return [0, slices // 2] if slices % 2 == 0 else [0]
