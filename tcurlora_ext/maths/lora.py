"""The delta of a layer as a product of two matrices, dW = B A: the form of a LoRA adapter.

With ``row`` (q_r, in), ``col`` (out, q_c) and B_l as in docs/maths.md, dW_l = scale * col B_l row. The middle matrix
B_l goes to the side where the rank is smaller:

by rows      A = row, B = scale * col B_l. All slices of a layer share A: the rank is q_r = r*S for any number of them.
by columns   A = scale * B_l row, B = col. The n slices of a fused layer need an A each: the rank is n * q_c = n*c*S.

Slices with cores of their own (``transform="identity"``) share neither: their matrices A are stacked, and B is
block-diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Factors
from .middle import BatchedMiddle


def lora_rank(calls: Sequence[Factors]) -> int:
    """The rank of :func:`lora_factors`, from shapes alone.

    Args:
        calls: As there.
    """
    return sum(min(_rank_by_rows(group), _rank_by_columns(group)) for group in _sharing_rows(calls))


def lora_factors(calls: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """A (q, in) and B (n*out, q) with dW = B A for the n slices of a layer, the scale included.

    Args:
        calls: The operator's calls for the layer, in the order of its slices, all in one dtype: that of the result.
    """
    pairs = [_of_group(group) for group in _sharing_rows(calls)]
    return torch.cat([A for A, _ in pairs]), torch.block_diag(*(B for _, B in pairs))


def _sharing_rows(calls: Sequence[Factors]) -> list[list[Factors]]:
    """The calls in groups of neighbours with one ``row``: slices of one core, also where each has a call of its own."""
    groups: list[list[Factors]] = []
    for call in calls:
        if groups and groups[-1][0].row is call.row:
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def _rank_by_rows(group: Sequence[Factors]) -> int:
    return group[0].row.shape[0]


def _rank_by_columns(group: Sequence[Factors]) -> int:
    return sum(call.num_slices * call.col.shape[1] for call in group)


def _of_group(group: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    row, col = group[0].row, group[0].col
    middle = torch.cat([_middle(call) for call in group])
    if _rank_by_rows(group) <= _rank_by_columns(group):
        return row, (col @ middle).flatten(0, 1)
    return (middle @ row).flatten(0, 1), torch.block_diag(*[col] * len(middle))


def _middle(call: Factors) -> Tensor:
    """``scale * B_l`` of the call's slices, dense: (num_slices, c*S, r*S)."""
    unit = torch.eye(call.row.shape[0], dtype=call.row.dtype, device=call.row.device)
    return BatchedMiddle(call, call.row.dtype).forward(unit).permute(1, 2, 0)
