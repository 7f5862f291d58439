"""Fused projections: which of them are split into slices, by name and shape.

A projection whose weight is several ones of one shape, stacked by rows, is as many slices. One whose parts differ in
shape, or whose rows are in another order, is one slice: ``query_key_value`` of BLOOM, NeoX and Falcon has q, k and v
of the first head, then those of the second, so that no equal part of its rows is q.
"""

from __future__ import annotations

from collections.abc import Mapping

from tcurlora_ext.adapter.config import DEFAULT_SPLIT

# Names under which k and v may have fewer heads than q. Their parts are equal where each has as many rows as columns.
_MAY_BE_GROUPED = ("c_attn", "Wqkv", "qkv_proj")


def parts_of(name: str, shape: tuple[int, int], split_fused: Mapping[str, int]) -> int:
    """The number of slices of a layer.

    Args:
        name: The layer's name; its last component counts.
        shape: (out, in) of the whole weight.
        split_fused: The option of this name. Under its default a projection of unequal parts is one slice; otherwise
            what it says is required.

    Raises:
        ValueError: The output features cannot be split into the number of equal slices that ``split_fused`` requires.
    """
    last = name.rpartition(".")[2]
    parts, (out_features, in_features) = split_fused.get(last, 1), shape
    if split_fused == DEFAULT_SPLIT:
        grouped = last in _MAY_BE_GROUPED and out_features != parts * in_features
        return 1 if grouped or out_features % parts else parts
    if out_features % parts:
        raise ValueError(f"{name}: {out_features} output features do not split into {parts} equal slices")
    return parts
