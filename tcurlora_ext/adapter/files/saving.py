"""Saving the adapter of a model; :mod:`tcurlora_ext.adapter.files.format` describes the content of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, distributed, nn

from tcurlora_ext.adapter.distributed.dtensor import sharded_parameter, whole
from tcurlora_ext.adapter.model.structure import CONTAINER, base_weights, require_container, stacks
from tcurlora_ext.io.atomic import write_bytes

from .fingerprint import fingerprint
from .format import FORMAT, HEADER


def save_adapter(model: nn.Module, path: str | os.PathLike[str], include_factors: bool = False) -> Path:
    """Save the adapter of a model to a safetensors file.

    The file holds r*c*S core parameters per stack, the chosen indices, all other parameters that train (a decoder, a
    head), and a fingerprint of the base weights. It also holds C and R where they are trained, or where they are not
    the columns and rows of the present base weights. A file at ``path`` is replaced only when the new one is complete.

    For a model sharded over processes, every process calls this. They gather the base weights of one stack at a time,
    the first process writes the file, and all processes return when it is written.

    Args:
        model: An adapted model, merged or not.
        path: The file, or an existing folder, which then gets ``adapter.safetensors``. Missing parents are created.
        include_factors: Save C and R in any case, so that the file can be loaded onto other base weights too.

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
        base = base_weights(model, stack)
        if include_factors or stack.options.trainable == "all" or not stack.is_of(base):
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
    # A tensor with two names (tied weights) is copied and saved under both: safetensors refuses shared memory.
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
    """Buffers (running statistics) of modules that own a trained parameter: training changes them as well."""
    owners = {name.rpartition(".")[0] for name, _ in _trained_beside(model)}
    persistent = model.state_dict().keys()
    return ((n, b) for n, b in model.named_buffers() if n.rpartition(".")[0] in owners and n in persistent)
