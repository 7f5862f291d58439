"""How many bytes an adapter file will take, from the shapes of its stacks alone.

The tensors are exact. The header is text, in which a float64 takes 15 to 21 characters: tests hold the sum to 3 % of
the files that are written.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.files.format import FORMAT
from tcurlora_ext.adapter.model.targets import Target, slice_names
from tcurlora_ext.adapter.subspace.files import OF_ADAPTER as HEADER
from tcurlora_ext.io.described import description
from tcurlora_ext.maths.fingerprint import PROBES

Ranks = Mapping[str, tuple[int, int]]
Groups = Mapping[str, list[Target]]
_FLOAT = 0.7571627795579906  # 18 characters, as most float64 numbers between 0.1 and 10 have in JSON


def stack_file_bytes(name: str, members: list[Target], rank: tuple[int, int], config: TCURConfig) -> int:
    """What one stack adds to the file: its tensors and its part of the header."""
    header = _header_bytes(config, {name: members}, {name: rank}) - _header_bytes(config, {}, {})
    return _data_bytes(members, rank, config) + header


def file_bytes(config: TCURConfig, groups: Groups, ranks: Ranks) -> int:
    """The whole file of an adapter with these stacks and nothing trained beside them."""
    data = sum(_data_bytes(members, ranks[name], config) for name, members in groups.items())
    return _header_bytes(config, groups, ranks) + data


def _tensors(members: list[Target], rank: tuple[int, int], config: TCURConfig) -> dict[str, torch.Tensor]:
    """The tensors of a stack in the file, on the meta device."""
    (out_features, in_features), (c, r) = members[0].shape, rank
    blocks = config.blocks(sum(target.slices for target in members))
    wide = torch.promote_types(members[0].weight.dtype, torch.float32)
    shapes: dict[str, tuple[int, ...]] = {"core": (blocks, c, r), "rows": (r,), "columns": (c,)}
    if config.trainable == "all":
        shapes |= {"col": (out_features, c * blocks), "row": (r * blocks, in_features)}
    indices = ("rows", "columns")
    return {
        kind: torch.empty(shape, dtype=torch.int64 if kind in indices else wide, device="meta")
        for kind, shape in shapes.items()
    }


def _data_bytes(members: list[Target], rank: tuple[int, int], config: TCURConfig) -> int:
    return sum(tensor.nbytes for tensor in _tensors(members, rank, config).values())


def _header_bytes(config: TCURConfig, groups: Groups, ranks: Ranks) -> int:
    """The header as safetensors writes it: the description, and an entry per tensor."""
    empty, described = {}, {}
    for name, members in groups.items():
        names, (c, r) = slice_names(members), ranks[name]
        described[name] = {
            "names": names, "scale": _FLOAT, "normalised": config.normalised, "row_scores": [_FLOAT] * r,
            "column_scores": [_FLOAT] * c, "base_dtype": str(members[0].weight.dtype).removeprefix("torch."),
            "fingerprint": [[_FLOAT] * (1 + PROBES)] * len(names),
        }  # fmt: skip
        for kind, tensor in _tensors(members, ranks[name], config).items():
            empty[f"{kind}.{name}"] = torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype)
    header = {"format": FORMAT, "config": config.to_json(), "stacks": described}
    return len(safetensors.torch.save(empty, {HEADER: description(header, empty)}))
