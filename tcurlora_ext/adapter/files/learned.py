"""Adapter files over learned factors: the cores of all stacks in one tensor, and the digest of their subspace.

Such a file has format 2. What a file of format 1 says of each stack, its subspace says once for all adapters over it.
Description and small tensors are packed (:mod:`tcurlora_ext.io.packed`); files written before 0.2 have them apart.

Tensors:  ``cores``, all cores one after another, flat; ``scales`` (stacks,) float64; with ``factors="learned_rows"``
``columns`` (columns,) int64 and ``column_scores``, flat, too; ``col.<stack>`` and ``row.<stack>`` with
``trainable="all"``, and ``col.<stack>`` where C is columns of quantised weights; ``trained.<name>`` and
``state.<name>`` as in format 1; ``directions.<name>`` where the file holds its subspace.
Header:   format, the digest of the subspace and perhaps, as ``directions``, its header, the options in which the
adapter's configuration differs from that of the subspace, the stacks' names and their ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.distributed.dtensor import whole
from tcurlora_ext.adapter.layer.carried import TCURCarried
from tcurlora_ext.adapter.options import LEARNED_ROWS
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.adapter.subspace.files import INSIDE, from_tensors

FORMAT = 2


def over_subspace(
    config: TCURConfig, stacks: Mapping[str, TCURStack], subspace: Subspace
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an adapter over a subspace."""
    known = subspace.config.to_json()
    header = {
        "format": FORMAT, "subspace": subspace.digest,
        "config": {name: value for name, value in config.to_json().items() if value != known[name]},
        "stacks": _short(list(stacks), list(subspace.stacks)), "ranks": _short([list(s.rank) for s in stacks.values()]),
    }  # fmt: skip
    tensors = {
        "cores": torch.cat([whole(stack.core.detach()).flatten() for stack in stacks.values()]),
        "scales": torch.tensor([stack.scale for stack in stacks.values()], dtype=torch.float64),
    }
    if config.factors == LEARNED_ROWS:
        tensors["columns"] = torch.cat([stack.columns for stack in stacks.values()])
        scores = [score for stack in stacks.values() for score in stack.column_scores]
        tensors["column_scores"] = torch.tensor(scores, dtype=torch.float64)
    for name, stack in stacks.items():
        if config.trainable == "all":
            tensors |= {f"{kind}.{name}": getattr(stack, kind) for kind in ("col", "row")}
        elif config.factors == LEARNED_ROWS and is_of_quantised(stack):
            tensors[f"col.{name}"] = stack.col
    return header, tensors


def is_of_quantised(stack: TCURStack) -> bool:
    """Whether layers of a stack are quantised: another loading of the base need not quantise it to the same bits."""
    return any(isinstance(layer, TCURCarried) for layer in stack.layers.values())


def _short(values: list[Any], default: list[Any] | None = None) -> Any:
    """A list in few bytes: None where it is the default, its one value where all are equal."""
    if values == default:
        return None
    return values[0] if default is None and all(value == values[0] for value in values) else values


def find_subspace(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Collection[Subspace | None]
) -> Subspace:
    """The subspace of an adapter file: the one that it holds, or one of those given.

    Raises ValueError where the one in it is damaged, or none of those given has the digest that the file names.
    """
    if INSIDE in header:
        return from_tensors(path, header[INSIDE], tensors, header["subspace"])
    found = [subspace for subspace in given if subspace is not None]
    for subspace in found:
        if subspace.digest == header["subspace"]:
            return subspace
    if not found:
        raise ValueError(
            f"{path}: the adapter is the cores over the subspace {header['subspace'][:12]}, which is not in the file; "
            "expected that subspace beside it: load_adapter(model, path, subspace=Subspace.load(file)); for a command, "
            "--subspace FILE"
        )
    raise ValueError(
        f"{path}: the adapter is over the subspace {header['subspace'][:12]}, found {found[-1].digest[:12]}"
    )


def as_stacks(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], subspace: Subspace
) -> tuple[TCURConfig, dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The configuration, the description of every stack and the tensors, as a file of format 1 has them.

    Raises ValueError where sizes differ.
    """
    config = TCURConfig.from_json({**subspace.config.to_json(), **header["config"]})
    names = header["stacks"] or list(subspace.stacks)
    ranks = header["ranks"]
    pairs = [tuple(pair) for pair in (ranks if isinstance(ranks[0], list) else [ranks] * len(names))]
    blocks = [config.blocks(len(subspace.stacks[name].names)) for name in names]
    columns = [c if config.factors == LEARNED_ROWS else 0 for c, _ in pairs]
    kinds = {
        "cores": [b * c * r for b, (c, r) in zip(blocks, pairs, strict=True)], "scales": [1] * len(names),
        "columns": columns, "column_scores": columns,
    }  # fmt: skip
    parts: dict[str, list[Tensor]] = {}
    for kind, sizes in kinds.items():
        tensor = tensors.get(kind, torch.empty(0, dtype=torch.int64 if kind == "columns" else torch.float64))
        if tensor.shape != (sum(sizes),):
            raise ValueError(f"{kind} has shape {tuple(tensor.shape)}, expected ({sum(sizes)},)")
        parts[kind] = list(tensor.split(sizes))
    described, found = {}, {n: t for n, t in tensors.items() if n.startswith(("trained.", "state.", "col.", "row."))}
    for at, name in enumerate(names):
        of_base = subspace.stacks[name]
        described[name] = {
            "names": list(of_base.names), "scale": float(parts["scales"][at]), "normalised": config.normalised,
            "row_scores": [], "column_scores": parts["column_scores"][at].tolist(), "base_dtype": of_base.base_dtype,
            "fingerprint": of_base.fingerprint.tolist(), "rank": pairs[at],
        }  # fmt: skip
        found[f"core.{name}"] = parts["cores"][at].reshape(blocks[at], *pairs[at])
        found[f"rows.{name}"], found[f"columns.{name}"] = torch.empty(0, dtype=torch.int64), parts["columns"][at]
    return config, described, found
