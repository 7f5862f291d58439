"""How many bytes an adapter file will take, from the shapes of its stacks alone.

The tensors are exact, but for small ones over learned factors, which are compressed: values drawn at random stand for
theirs. The header is text, in which a float64 takes 15 to 21 characters. Tests hold the sum to 3 % of the files that
are written, over learned factors to 6 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import safetensors.torch
import torch

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.files import learned
from tcurlora_ext.adapter.files.format import FORMAT
from tcurlora_ext.adapter.learning.warmup import WarmUp, about
from tcurlora_ext.adapter.model.targets import Target, slice_names
from tcurlora_ext.adapter.options import LEARNED_ROWS, WEIGHTS
from tcurlora_ext.adapter.subspace import StackDirections, Subspace
from tcurlora_ext.adapter.subspace.files import HEADER as OF_SUBSPACE
from tcurlora_ext.adapter.subspace.files import INSIDE
from tcurlora_ext.adapter.subspace.files import OF_ADAPTER as HEADER
from tcurlora_ext.io.described import description
from tcurlora_ext.io.packed import SMALL, pack
from tcurlora_ext.maths import coding
from tcurlora_ext.maths.coding import CODED_BITS as BITS
from tcurlora_ext.maths.fingerprint import PROBES

Ranks = Mapping[str, tuple[int, int]]
Groups = Mapping[str, Sequence[Target]]
_FLOAT = 0.7571627795579906  # 18 characters, as most float64 numbers between 0.1 and 10 have in JSON


def stack_file_bytes(name: str, members: Sequence[Target], rank: tuple[int, int], config: TCURConfig) -> int:
    """What one stack adds to the file: its tensors and its part of the header."""
    groups, ranks = {name: members}, {name: rank}
    return file_bytes(config, groups, ranks) - _saved(_described(config, {}, {}, BITS), {}, HEADER, BITS)


def file_bytes(config: TCURConfig, groups: Groups, ranks: Ranks, bits: int | None = BITS) -> int:
    """The whole file of an adapter with these stacks and nothing trained beside them.

    Args:
        config: The adapter's configuration.
        groups: The targets of every stack.
        ranks: The rank of every stack.
        bits: Where factors are learned: the bits of the subspace in the file; None: it is named by digest alone.
    """
    tensors = _tensors(config, groups, ranks)
    if config.factors != WEIGHTS and bits is not None:
        tensors |= {f"{INSIDE}.{name}": t for name, t in _directions(config, groups, ranks, bits).items()}
    return _saved(_described(config, groups, ranks, bits), tensors, HEADER, bits)


def subspace_bytes(config: TCURConfig, groups: Groups, ranks: Ranks, bits: int) -> int:
    """The file of a subspace, of :meth:`tcurlora_ext.Subspace.save`."""
    header = _subspace(config, groups, ranks, bits).header()
    return _saved(header, _directions(config, groups, ranks, bits), OF_SUBSPACE, bits)


def _saved(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], key: str, bits: int | None) -> int:
    """The bytes of a safetensors file of tensors on the meta device, with an entry in its header for each."""
    empty = {name: torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype) for name, tensor in tensors.items()}
    text = description(header, empty)
    if header["format"] == FORMAT and key == HEADER:
        return len(safetensors.torch.save(empty, {key: text})) + sum(tensor.nbytes for tensor in tensors.values())
    draw = torch.Generator().manual_seed(0)
    small = {name: _drawn(tensor, draw, bits) for name, tensor in tensors.items() if tensor.nbytes < SMALL}
    return len(pack(small, key, text)) + sum(t.nbytes for name, t in tensors.items() if name not in small)


def _drawn(tensor: torch.Tensor, draw: torch.Generator, bits: int | None) -> torch.Tensor:
    """Values that take as many bytes when they are compressed as those of such a tensor in a file."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.dtype)
    if tensor.dtype != torch.uint8 or bits is None:
        return torch.randint(0, 1024, tensor.shape, generator=draw, dtype=tensor.dtype)  # indices of features
    codes = _codes(bits)
    taken = torch.randint(len(codes), (-(-tensor.numel() // codes.shape[1]),), generator=draw)
    return codes[taken].flatten()[: tensor.numel()]


@cache
def _codes(bits: int) -> torch.Tensor:
    """Codes of directions drawn at random, a whole number of bytes each: (number, bytes)."""
    columns = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    return coding.pack(coding.rounded(columns, bits), bits).view(-1, max(1, bits // 8))


def _tensors(config: TCURConfig, groups: Groups, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file, on the meta device, without a subspace's."""
    found: dict[str, torch.Tensor] = {}
    blocks = {name: _blocks(config, members) for name, members in groups.items()}
    for name, members in groups.items():
        (out_features, in_features), (c, r), B = members[0].shape, ranks[name], blocks[name]
        wide = torch.promote_types(members[0].weight.dtype, torch.float32)
        if config.factors == WEIGHTS:
            found[f"core.{name}"] = _meta(wide, B, c, r)
            found |= {f"rows.{name}": _meta(torch.int64, r), f"columns.{name}": _meta(torch.int64, c)}
        if config.trainable == "all":
            found |= {f"col.{name}": _meta(wide, out_features, c * B), f"row.{name}": _meta(wide, r * B, in_features)}
    if config.factors != WEIGHTS and groups:
        cores = sum(blocks[name] * ranks[name][0] * ranks[name][1] for name in groups)
        found |= {"cores": _meta(wide, cores), "scales": _meta(torch.float64, len(groups))}
        if config.factors == LEARNED_ROWS:
            columns = sum(ranks[name][0] for name in groups)
            found |= {"columns": _meta(torch.int64, columns), "column_scores": _meta(torch.float64, columns)}
    return found


def _directions(config: TCURConfig, groups: Groups, ranks: Ranks, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a subspace, on the meta device."""
    found = {}
    for name, members in groups.items():
        (out_features, in_features), (c, r) = members[0].shape, ranks[name]
        for side, entries in (("left", out_features * c), ("right", in_features * r)):
            count = -(-_blocks(config, members) * entries * bits // 8)
            found[f"{side}.{name}"] = _meta(torch.uint8, count)
    return found


def _described(config: TCURConfig, groups: Groups, ranks: Ranks, bits: int | None) -> dict[str, Any]:
    """The description in an adapter file."""
    if config.factors == WEIGHTS:
        described = {}
        for name, members in groups.items():
            names, (c, r) = slice_names(members), ranks[name]
            described[name] = {
                "names": names, "scale": _FLOAT, "normalised": config.normalised, "row_scores": [_FLOAT] * r,
                "column_scores": [_FLOAT] * c, "base_dtype": str(members[0].weight.dtype).removeprefix("torch."),
                "fingerprint": [[_FLOAT] * (1 + PROBES)] * len(names),
            }  # fmt: skip
        return {"format": FORMAT, "config": config.to_json(every=False), "stacks": described}
    pairs = [list(ranks[name]) for name in groups]
    header = {
        "format": learned.FORMAT, "subspace": hashlib.sha256().hexdigest(), "config": {}, "stacks": None,
        "ranks": pairs[0] if pairs and all(pair == pairs[0] for pair in pairs) else pairs,
    }  # fmt: skip
    if bits is not None:
        header[INSIDE] = _subspace(config, groups, ranks, bits).header()
    return header


def _subspace(config: TCURConfig, groups: Groups, ranks: Ranks, bits: int) -> Subspace:
    """A subspace with the right description, and no directions."""
    none = torch.empty(0, dtype=torch.uint8)
    stacks, draw = {}, torch.Generator().manual_seed(0)
    for name, members in groups.items():
        names = tuple(slice_names(members))
        prints = torch.randn(len(names), 1 + PROBES, generator=draw, dtype=torch.float64)
        energy, change = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        dtype = str(members[0].weight.dtype).removeprefix("torch.")
        stacks[name] = StackDirections(names, members[0].shape, ranks[name], none, none, energy, change, dtype, prints)
    return Subspace(config, bits, stacks, about(WarmUp(), 1, [_FLOAT, _FLOAT]))


def _blocks(config: TCURConfig, members: Sequence[Target]) -> int:
    return config.blocks(sum(target.slices for target in members))


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
