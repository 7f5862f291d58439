"""A fingerprint of base weights, so that an adapter is loaded only onto the weights on which it was trained.

It has, for every slice W_l (out, in), the Frobenius norm and a few sums ``u^T W_l v`` with fixed sign vectors u and v,
all in float64. A change of any entry by d changes each sum by d or -d, and sums of the same entries agree up to
rounding, so within one dtype a comparison is as exact as that of a hash. Unlike a hash it also shows how far two
weights are apart: an adapter trained on float32 weights can be loaded onto the same weights in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROBES = 4


def fingerprint(weights: Tensor) -> Tensor:
    """The fingerprint of weights (S, out, in): (S, 1 + PROBES) float64 on the CPU, the norm, then sums over norm."""
    _, out_features, in_features = weights.shape
    left, right = _signs(out_features, 0).to(weights.device), _signs(in_features, 1).to(weights.device)
    result = []
    for weight in weights:
        matrix = weight.double()
        norm = matrix.norm()
        sums = ((left.T @ matrix) * right.T).sum(1)
        result.append(torch.cat([norm[None], sums / norm.clamp_min(1e-300)]))
    return torch.stack(result).cpu()


def _signs(length: int, salt: int) -> Tensor:
    """Signs (length, PROBES), +1 or -1, from a 64-bit integer hash: no random generator whose stream may change."""
    mask = (1 << 64) - 1
    values = []
    for i in range(length * PROBES):
        z = ((i + 1) * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(1.0 if (z ^ (z >> 31)) & 1 else -1.0)
    return torch.tensor(values, dtype=torch.float64).view(length, PROBES)


def mismatch(saved: Tensor, found: Tensor, saved_dtype: str, found_dtype: torch.dtype) -> list[int]:
    """The indices of the slices whose fingerprints differ by more than rounding to their dtypes explains."""
    dtypes = {saved_dtype, str(found_dtype).removeprefix("torch.")}
    # Rounding errors between dtypes are independent: they change a sum over the matrix by about eps/sqrt(12) norms.
    eps = max(torch.finfo(getattr(torch, name)).eps for name in dtypes)
    tolerance = 1e-9 if len(dtypes) == 1 else 2 * eps
    close = torch.isclose(saved, found, rtol=tolerance, atol=tolerance)
    return torch.nonzero(~close.all(1)).flatten().tolist()
