"""Adapter files: one safetensors file, whose header holds the description as JSON. Loading runs no code from it.

Tensors:  ``core.<stack>`` (S, c, r) in its core_domain, or (fewer, c, r) with ``frequencies``, ``rows.<stack>``,
``columns.<stack>`` int64, ``trained.<name>`` for every parameter of the model that trains beside the cores,
``state.<name>`` for the buffers of modules that own such a parameter; with ``include_factors`` also ``col.<stack>`` and
``row.<stack>``.
Header:   ``tcurlora`` -> format version, configuration, and for each stack the names of its slices, scale, dtype and
fingerprint of the base weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, distributed, nn

from .atomic import write_bytes
from .config import TCURConfig
from .dtensor import sharded_parameter, whole
from .fingerprint import PROBES, fingerprint
from .inject import CONTAINER, adapted_layers, require_container, stacks
from .stack import TCURStack
from .tensorfile import read_tensors

FORMAT = 1
HEADER = "tcurlora"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says: its description and its tensors by name."""

    path: Path
    config: TCURConfig
    stacks: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one kind ("core", "trained", ...), without the prefix."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], include_factors: bool = False) -> Path:
    """Write the adapter of a model to a file, in safetensors.

    It holds r*c*S numbers a stack, the chosen indices, what else trains (a decoder, a head), and a fingerprint of the
    base weights. Where C and R are trained, or are not those of the base weights as they are now, it holds them too.
    The file appears whole or not at all: an older one stays until the new one is written.

    Of a model sharded over processes every process calls this and gathers the base weights of one stack at a time; the
    first one writes, and all return when the file is there.

    Args:
        model: An adapted model, merged or not.
        path: The file, or a folder that is there, for ``adapter.safetensors`` in it. Missing parents are made.
        include_factors: Save C and R in any case, so that the file loads onto other base weights too.

    Returns:
        The path of the file.

    Raises:
        ValueError: The model is not adapted.
    """
    path = Path(path)
    path = path / "adapter.safetensors" if path.is_dir() else path
    container = require_container(model)
    tensors: dict[str, Tensor] = {}
    description: dict[str, dict[str, Any]] = {}
    for name, stack in stacks(model).items():
        tensors |= {f"{kind}.{name}": getattr(stack, kind) for kind in ("core", "rows", "columns")}
        base = _base_weights(model, stack)
        if include_factors or stack.trainable == "all" or not stack.is_of(base):
            tensors |= {f"{kind}.{name}": getattr(stack, kind) for kind in ("col", "row")}
        description[name] = {
            "names": stack.names,
            "scale": stack.scale,
            "normalised": stack.normalised,
            "row_scores": stack.row_scores,
            "column_scores": stack.column_scores,
            "base_dtype": str(base.dtype).removeprefix("torch."),
            "fingerprint": fingerprint(base).tolist(),
        }
    tensors |= {f"trained.{name}": p for name, p in _trained_beside(model)}
    tensors |= {f"state.{name}": b for name, b in _buffers_beside(model)}
    header = {"format": FORMAT, "config": container.config.to_json(), "stacks": description}
    # A tensor that two names share (tied weights) is written under both: safetensors refuses shared memory.
    content = {name: whole(t.detach()).cpu().contiguous().clone() for name, t in tensors.items()}
    sharded = sharded_parameter(model) is not None
    if not sharded or distributed.get_rank() == 0:
        write_bytes(path, safetensors.torch.save(content, {HEADER: json.dumps(header)}))
    if sharded:
        distributed.barrier()
    return path


def _trained_beside(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad and CONTAINER not in n.split("."))


def _buffers_beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers (running statistics) of the modules that own a trained parameter: training changes them too."""
    owners = {name.rpartition(".")[0] for name, _ in _trained_beside(model)}
    persistent = model.state_dict().keys()
    return ((n, b) for n, b in model.named_buffers() if n.rpartition(".")[0] in owners and n in persistent)


def _base_weights(model: nn.Module, stack: TCURStack) -> Tensor:
    """The base weights (S, out, in) of a stack, also where its layers are merged."""
    layers = {layer.first_slice: layer for _, layer in adapted_layers(model) if layer.stack is stack}
    return torch.cat([layers[first].weight_slices() for first in sorted(layers)])


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file. Raises FileNotFoundError, or ValueError for a truncated, foreign or inconsistent one."""
    path = Path(path)
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter file")
    metadata, tensors = read_tensors(path, "an adapter saved by save_adapter")
    if HEADER not in metadata:
        raise ValueError(f"{path}: found a safetensors file without a {HEADER!r} header, expected one by save_adapter")
    try:
        header = json.loads(metadata[HEADER])
        version, config, described = header["format"], header["config"], header["stacks"]
        if version == FORMAT:
            file_ = AdapterFile(path, TCURConfig.from_json(config), dict(described), tensors)
            for name, stack in file_.stacks.items():
                _check_stack(name, stack, tensors, file_.config.blocks(len(stack["names"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the adapter's description is damaged: {error!r}") from None
    if version != FORMAT:
        raise ValueError(f"{path}: found adapter format {version!r}, expected {FORMAT}")
    return file_


def _check_stack(name: str, stack: Mapping[str, Any], tensors: Mapping[str, Tensor], blocks: int) -> None:
    core, rows, columns = (tensors[f"{kind}.{name}"] for kind in ("core", "rows", "columns"))
    expected = (blocks, columns.numel(), rows.numel())
    if tuple(core.shape) != expected:
        raise ValueError(f"core.{name} has shape {tuple(core.shape)}, expected {expected}")
    if not bool(torch.isfinite(core).all()):
        raise ValueError(f"core.{name} has NaN or infinite values")
    for kind, indices in (("rows", rows), ("columns", columns)):
        if indices.dtype != torch.int64 or indices.dim() != 1 or int(indices.min()) < 0:
            raise ValueError(f"{kind}.{name} are {indices.dtype} {tuple(indices.shape)}, expected indices from 0")
    numbers = {
        "scale": (),
        "fingerprint": (len(stack["names"]), 1 + PROBES),
        "row_scores": rows.shape,
        "column_scores": columns.shape,
    }
    for entry, shape in numbers.items():
        found = torch.tensor(stack[entry], dtype=torch.float64)
        if found.shape != shape or (entry == "scale" and not bool(torch.isfinite(found))):
            raise ValueError(
                f"{entry} of stack {name} is {stack[entry]!r:.60}, expected numbers of shape {tuple(shape)}"
            )
    if not isinstance(getattr(torch, str(stack["base_dtype"]), None), torch.dtype):
        raise ValueError(f"base_dtype of stack {name} is {stack['base_dtype']!r}, expected a floating dtype")
    if not isinstance(stack["normalised"], bool):
        raise ValueError(f"normalised of stack {name} is {stack['normalised']!r}, expected true or false")
