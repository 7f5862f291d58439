"""The spectrum of a stack, and how much of its energy an approximation of a given tubal rank keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import transform_named


def spectrum(tensor: Tensor, transform: str = "dft") -> tuple[Tensor, Tensor]:
    """The orthonormal slice transform of a tensor by frequency.

    The DFT gives S//2 + 1 frequencies, one of each conjugate pair. The DCT and the identity give S.

    Args:
        tensor: (S, m, n), real.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.

    Returns:
        The frequencies (S//2 + 1 or S, m, n), and the weight of each in the energy, 2 for one of a conjugate pair.
    """
    return transform_named(transform).spectrum(tensor)


def inverse_spectrum(blocks: Tensor, slices: int, transform: str = "dft") -> Tensor:
    """The inverse of :func:`spectrum`.

    Args:
        blocks: (S//2 + 1 or S, m, n). The DFT's may be fewer: missing ones are taken as zero.
        slices: S, the number of slices.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.

    Returns:
        (S, m, n), real.
    """
    return transform_named(transform).inverse_spectrum(blocks, slices)


def energy_by_rank(weights: Tensor, transform: str = "dft", frequencies: int | None = None) -> Tensor:
    """The energy of the i-th singular direction, ``sum_k sigma_i(W_k)^2`` over the frequencies W_k of the weights.

    The first r entries add up to the energy ``sum_l |W_l|^2`` that the best approximation of tubal rank r keeps (Kilmer
    and Martin 2011), and all entries to the energy of the weights. The cost is the eigenvalues of one matrix per
    frequency, as wide as the smaller side of a weight, and memory for two copies of the weights in float64.

    Args:
        weights: W (S, out, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        frequencies: Sum over the k below this alone; None: over all.

    Returns:
        (min(out, in),) float64.
    """
    matrices, counts = spectrum(weights.detach().double(), transform)
    energy = torch.zeros(min(weights.shape[1:]), dtype=torch.float64, device=weights.device)
    for matrix, count in zip(matrices[:frequencies], counts[:frequencies], strict=True):
        gram = matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix
        energy += count * torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return energy
