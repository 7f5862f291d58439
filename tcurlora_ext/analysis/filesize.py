"""How many bytes an adapter file will take, from the shapes of its stacks: what files.py would write.

The tensors are exact. The header holds float64 numbers as text, whose lengths differ by a few percent; tests hold the
sum to 3 % of real files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.files.format import FORMAT, HEADER
from tcurlora_ext.adapter.model.targets import Target, slice_names

# Numbers as long as those of a real description. The sums of a fingerprint are about 1, with either sign.
_NUMBER = 3.2733969392472106
_SUMS = [0.7571627795579906, -0.3408158955916422, 1.2846831760113122, -1.0941656974025087]


def stack_file_bytes(name: str, members: list[Target], rank: tuple[int, int], config: TCURConfig) -> int:
    """What one stack adds to the file: its tensors and its part of the header."""
    header = _header_bytes(config, {name: members}, {name: rank}) - _header_bytes(config, {}, {})
    return _data_bytes(members, rank, config) + header


def file_bytes(config: TCURConfig, groups: Mapping[str, list[Target]], ranks: Mapping[str, tuple[int, int]]) -> int:
    """The whole file of an adapter with these stacks and nothing trained beside them."""
    data = sum(_data_bytes(members, ranks[name], config) for name, members in groups.items())
    return _header_bytes(config, groups, ranks) + data


def _shapes(
    members: list[Target], rank: tuple[int, int], config: TCURConfig
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensors of a stack in the file: kind -> (dtype, shape, bytes of a number)."""
    (out_features, in_features), (c, r) = members[0].shape, rank
    blocks = config.blocks(sum(target.slices for target in members))
    size = max(4, members[0].weight.dtype.itemsize)
    dtype = "F64" if size == 8 else "F32"
    shapes: dict[str, tuple[str, tuple[int, ...], int]] = {
        "core": (dtype, (blocks, c, r), size), "rows": ("I64", (r,), 8), "columns": ("I64", (c,), 8)
    }  # fmt: skip
    if config.trainable == "all":
        shapes["col"] = (dtype, (out_features, c * blocks), size)
        shapes["row"] = (dtype, (r * blocks, in_features), size)
    return shapes


def _data_bytes(members: list[Target], rank: tuple[int, int], config: TCURConfig) -> int:
    return sum(math.prod(shape) * size for _, shape, size in _shapes(members, rank, config).values())


def _header_bytes(config: TCURConfig, groups: Mapping[str, list[Target]], ranks: Mapping[str, tuple[int, int]]) -> int:
    """The header as files.py writes it: 8 bytes of length, then JSON; numbers replaced by ones as long."""
    entries: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name, members in groups.items():
        names, (c, r) = slice_names(members), ranks[name]
        described[name] = {
            "names": names, "scale": _NUMBER, "normalised": config.scale is None,
            "row_scores": [_NUMBER] * r, "column_scores": [_NUMBER] * c,
            "base_dtype": str(members[0].weight.dtype).removeprefix("torch."),
            "fingerprint": [[_NUMBER, *_SUMS]] * len(names),
        }  # fmt: skip
        for kind, (dtype, shape, _) in _shapes(members, ranks[name], config).items():
            entries[f"{kind}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [100_000, 100_000]}
    header = json.dumps({"format": FORMAT, "config": config.to_json(), "stacks": described})
    entries["__metadata__"] = {HEADER: header}
    return 8 + len(json.dumps(entries, separators=(",", ":")))
