"""Adapter files: one safetensors file with a description as JSON in its header. Loading runs no code from the file.

Tensors:  ``core.<stack>`` (S, c, r) in its core_domain, or (fewer, c, r) with ``frequencies``; ``rows.<stack>`` and
``columns.<stack>``, int64; ``trained.<name>`` for every parameter of the model that trains besides the cores;
``state.<name>`` for buffers that training changes; with ``include_factors`` also ``col.<stack>`` and ``row.<stack>``.
Header:   ``tcurlora`` -> format version, configuration, and for every stack the names of its slices, its scale, and
the dtype and fingerprint of its base weights; and the digest, SHA-256 of all of it, which files written before 0.2 do
not have. Files over learned factors are of another format: :mod:`tcurlora_ext.adapter.files.learned`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.adapter.subspace.files import DAMAGE
from tcurlora_ext.adapter.subspace.files import OF_ADAPTER as HEADER
from tcurlora_ext.io.described import digest
from tcurlora_ext.io.tensors import not_finite, read_tensors
from tcurlora_ext.maths.fingerprint import PROBES

from . import learned

FORMAT = 1
VERSIONS = (FORMAT, learned.FORMAT)


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file: its description, its tensors by name, and the subspace of learned factors."""

    path: Path
    config: TCURConfig
    stacks: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    subspace: Subspace | None = None

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one kind ("core", "trained", ...), without the prefix."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def read_adapter(path: str | os.PathLike[str], subspaces: Sequence[Subspace | None] = ()) -> AdapterFile:
    """Read an adapter file, with one of the subspaces where it names one that it does not hold.

    Raises FileNotFoundError where there is none, ValueError where it is truncated, inconsistent or no adapter file, or
    where none of the subspaces is the one that it names.
    """
    path = Path(path)
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.exists():
        of_peft = (path.parent / "adapter_config.json").exists()
        hint = "; PEFT wrote its folder: use PeftModel.from_pretrained" if of_peft else ""
        raise FileNotFoundError(f"{path}: no such adapter file{hint}")
    metadata, tensors = read_tensors(path, "an adapter saved by save_adapter")
    if HEADER not in metadata:
        raise ValueError(f"{path}: found a safetensors file without a {HEADER!r} header, expected one by save_adapter")
    try:
        header = dict(json.loads(metadata[HEADER]))
        stated = header.pop("digest", None)
        version, config, described = header["format"], header["config"], header["stacks"]
        over_subspace = version == learned.FORMAT
        if over_subspace and not isinstance(header["subspace"], str):
            raise TypeError(f"subspace is {header['subspace']!r:.60}, expected a digest")
    except DAMAGE as error:
        raise ValueError(f"{path}: the adapter's description is damaged: {error!r}") from None
    subspace = learned.find_subspace(path, header, tensors, subspaces) if over_subspace else None
    try:
        if version == FORMAT:
            file_ = AdapterFile(path, TCURConfig.from_json(config), dict(described), tensors)
        elif subspace is not None:
            file_ = AdapterFile(path, *learned.as_stacks(header, tensors, subspace), subspace)
        if version in VERSIONS:
            for name, stack in file_.stacks.items():
                _check_stack(name, stack, file_.tensors, file_.config.blocks(len(stack["names"])))
    except DAMAGE as error:
        raise ValueError(f"{path}: the adapter's description is damaged: {error!r}") from None
    if version not in VERSIONS:
        raise ValueError(f"{path}: found adapter format {version!r}, expected one of {', '.join(map(str, VERSIONS))}")
    if stated is not None and stated != digest(header, tensors):
        raise ValueError(f"{path}: the file is damaged: its content has another digest than the one that it states")
    return file_


def _check_stack(name: str, stack: Mapping[str, Any], tensors: Mapping[str, Tensor], blocks: int) -> None:
    core, rows, columns = (tensors[f"{kind}.{name}"] for kind in ("core", "rows", "columns"))
    expected = (blocks, *stack.get("rank", (columns.numel(), rows.numel())))
    if tuple(core.shape) != expected:
        raise ValueError(f"core.{name} has shape {tuple(core.shape)}, expected {expected}")
    if not core.is_floating_point():
        raise ValueError(f"core.{name} is {core.dtype}, expected a floating dtype")
    if not_finite({name: core}):
        raise ValueError(f"core.{name} has NaN or infinite values")
    for kind, indices in (("rows", rows), ("columns", columns)):
        if indices.dtype != torch.int64 or indices.dim() != 1 or bool((indices < 0).any()):
            raise ValueError(f"{kind}.{name} are {indices.dtype} {tuple(indices.shape)}, expected indices from 0")
    if not isinstance(stack["names"], list) or not all(isinstance(slice_name, str) for slice_name in stack["names"]):
        raise ValueError(f"names of stack {name} are {stack['names']!r:.60}, expected a list of strings")
    shapes = {
        "scale": (),
        "fingerprint": (len(stack["names"]), 1 + PROBES),
        "row_scores": rows.shape,
        "column_scores": columns.shape,
    }
    for entry, shape in shapes.items():
        found = torch.tensor(stack[entry], dtype=torch.float64)
        if found.shape != shape or (entry == "scale" and not bool(torch.isfinite(found))):
            raise ValueError(
                f"{entry} of stack {name} is {stack[entry]!r:.60}, expected numbers of shape {tuple(shape)}"
            )
    if not isinstance(getattr(torch, str(stack["base_dtype"]), None), torch.dtype):
        raise ValueError(f"base_dtype of stack {name} is {stack['base_dtype']!r}, expected a floating dtype")
    if not isinstance(stack["normalised"], bool):
        raise ValueError(f"normalised of stack {name} is {stack['normalised']!r}, expected true or false")
