"""The file of a subspace: a safetensors file with a description as JSON, packed (:mod:`tcurlora_ext.io.packed`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.described import description, digest
from tcurlora_ext.io.packed import pack
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.maths.coding import BITS
from tcurlora_ext.maths.fingerprint import PROBES

from .subspace import StackDirections, Subspace, require_whole

HEADER = "tcurlora_subspace"
OF_ADAPTER = "tcurlora"  # the header of an adapter's file
INSIDE = "directions"  # where such a file has its subspace: in its header, and before the names of its tensors
# What reading a damaged description raises.
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def write_subspace(subspace: Subspace, path: Path) -> Path:
    """Write the file of a subspace."""
    tensors = subspace.tensors()
    write_bytes(path, pack(tensors, HEADER, description(subspace.header(), tensors)))
    return path


def is_subspace(path: Path) -> bool:
    """Whether this is the file of a subspace, and not that of an adapter, a damaged one or another."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return HEADER in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def read_subspace(path: Path) -> Subspace:
    """Read a subspace from its own file, or from that of an adapter that holds it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of a subspace")
    metadata, tensors = read_tensors(path, "a subspace by learn_factors")
    header: dict[str, Any] | None
    try:
        if HEADER in metadata:
            header = dict(json.loads(metadata[HEADER]))
            stated = str(header.pop("digest"))
        else:
            of_adapter = dict(json.loads(metadata.get(OF_ADAPTER, "{}")))
            header, stated = of_adapter.get(INSIDE), of_adapter.get("subspace", "")
    except DAMAGE as error:
        raise ValueError(f"{path}: the subspace's description is damaged: {error!r}") from None
    if header is None:
        hint = ", but an adapter that names its subspace by digest alone" if stated else ""
        raise ValueError(f"{path}: found no subspace{hint}; expected a file by Subspace.save")
    return from_tensors(path, header, tensors, stated)


def from_tensors(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], stated: str) -> Subspace:
    """The subspace of a description and tensors, those of its own file or of an adapter's.

    Raises ValueError where they are damaged, or have another digest than the one that is stated.
    """
    tensors = {name.removeprefix(f"{INSIDE}."): t for name, t in tensors.items() if _is_direction(name)}
    try:
        version = header["format"]
        if version == 1:
            bits = header["bits"]
            if bits not in BITS:
                raise ValueError(f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
            stacks = {name: _stack(name, entry, tensors) for name, entry in dict(header["stacks"]).items()}
            subspace = Subspace(TCURConfig.from_json(header["config"]), bits, stacks, dict(header["about"]))
    except DAMAGE as error:
        raise ValueError(f"{path}: the subspace's description is damaged: {error!r}") from None
    if version != 1:
        raise ValueError(f"{path}: found format {version!r} of a subspace, expected 1")
    if stated != digest(header, tensors):
        raise ValueError(f"{path}: the subspace is damaged: it has another digest than the one that is stated")
    require_whole(subspace)
    return subspace


def _is_direction(name: str) -> bool:
    return name.removeprefix(f"{INSIDE}.").startswith(("left.", "right."))


def _stack(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StackDirections:
    names = tuple(str(own) for own in entry["names"])
    prints = torch.tensor(entry["fingerprint"], dtype=torch.float64)
    if prints.shape != (len(names), 1 + PROBES):
        raise ValueError(f"fingerprint of stack {name} has shape {tuple(prints.shape)}")
    (out_features, in_features), (c, r) = map(int, entry["shape"]), map(int, entry["rank"])
    return StackDirections(
        names, (out_features, in_features), (c, r), tensors[f"left.{name}"], tensors[f"right.{name}"],
        float(entry["energy"]), float(entry["change"]), str(entry["base_dtype"]), prints,
    )  # fmt: skip
