"""The spectrum of a stack, and how much of its energy every tubal rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import transform_named


def spectrum(tensor: Tensor, transform: str = "dft") -> tuple[Tensor, Tensor]:
    """The orthonormal slice transform of a tensor by frequency.

    Of conjugate frequencies of the DFT one stands for both: S//2 + 1 of them. S for the DCT and for the identity.

    Args:
        tensor: (S, m, n), real.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.

    Returns:
        The frequencies (S//2 + 1 or S, m, n), and how often each counts in the energy.
    """
    return transform_named(transform).spectrum(tensor)


def inverse_spectrum(blocks: Tensor, slices: int, transform: str = "dft") -> Tensor:
    """The inverse of :func:`spectrum`.

    Args:
        blocks: (S//2 + 1 or S, m, n); the DFT's may be the first few, the others are zero.
        slices: S, how many slices there are.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.

    Returns:
        (S, m, n), real.
    """
    return transform_named(transform).inverse_spectrum(blocks, slices)


def energy_by_rank(weights: Tensor, transform: str = "dft", frequencies: int | None = None) -> Tensor:
    """What the i-th singular direction of all frequencies holds: ``sum_k sigma_i(W_k)^2``, W_k being a slice of the
    spectrum.

    The first r numbers add up to the energy ``sum_l |W_l|^2`` that the best approximation of tubal rank r keeps (Kilmer
    and Martin 2011), all of them to that of the weights. Takes the eigenvalues of one matrix a frequency, as wide as
    the smaller side, and memory for the weights twice in double precision.

    Args:
        weights: W (S, out, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        frequencies: Only k below this; None: all.

    Returns:
        (min(out, in),) float64.
    """
    matrices, counts = spectrum(weights.detach().double(), transform)
    energy = torch.zeros(min(weights.shape[1:]), dtype=torch.float64, device=weights.device)
    for matrix, count in zip(matrices[:frequencies], counts[:frequencies], strict=True):
        gram = matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix
        energy += count * torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return energy
