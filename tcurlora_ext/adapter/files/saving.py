"""Saving the adapter of a model; :mod:`tcurlora_ext.adapter.files.format` describes the content of the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import sharded_parameter, whole
from tcurlora_ext.adapter.distributed.first import write_in_first
from tcurlora_ext.adapter.model.effect import warn_without_effect
from tcurlora_ext.adapter.model.structure import (
    Adapted,
    base_weights,
    buffers_beside,
    changed_buffers,
    require_adapted,
    require_all_layers,
    stacks,
    trained_beside,
)
from tcurlora_ext.adapter.subspace.files import INSIDE
from tcurlora_ext.adapter.subspace.files import OF_ADAPTER as HEADER
from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.described import description
from tcurlora_ext.io.packed import pack
from tcurlora_ext.io.tensors import not_finite
from tcurlora_ext.maths.fingerprint import fingerprint

from .format import FORMAT
from .learned import is_of_quantised, over_subspace


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], include_factors: bool = False, include_subspace: bool = True
) -> Path:
    """Save the adapter of a model to a safetensors file.

    The file holds r*c*S core parameters per stack, the chosen indices, all other parameters that train (a decoder, a
    head; also when it was frozen again), running statistics that training has changed, and a fingerprint of the base
    weights. It also holds C and R where they are trained, where the base is quantised, or where they are not the
    columns and rows of the present base weights. Where factors are learned, it holds their subspace, coded, or with
    ``include_subspace=False`` its digest alone: a few kilobytes, where many adapters share one subspace. A file at
    ``path`` is replaced only when the new one is complete.

    For a model sharded over processes, every process calls this. They gather the base weights of one stack at a time,
    the first process writes the file, and all processes return when it is written.

    Args:
        model: An adapted model, merged or not; or a module around one, such as a wrapper of DDP or torch.compile. Names
            in the file are those of the model that was adapted.
        path: The file, or an existing folder, which then gets ``adapter.safetensors``. Missing parents are created.
        include_factors: Save C and R in any case, so that the file can be loaded onto other base weights too; without
            effect where factors are learned.
        include_subspace: Whether the file holds the subspace of learned factors; without it, :func:`load_adapter` needs
            the subspace too.

    Returns:
        The path of the file.

    Raises:
        ValueError: The model is not adapted, or is a part of an adapted one; several of its parts were adapted apart;
            an adapted layer is not in it any more; or a value is NaN or infinite. No file is written.
        OSError: The file cannot be written (no permission, no space). Of a sharded model every process raises it.

    Warns:
        UserWarning: A module around the adapted model has trained parameters, which are not saved; or adapted layers
            were never called, or cores never trained, while others, or parameters beside them, were.
    """
    path = Path(path)
    path = path / "adapter.safetensors" if path.is_dir() else path
    adapted = require_adapted(model)
    require_all_layers(adapted)
    warn_without_effect(adapted)
    warn_of_others(model, adapted)
    model = adapted.model
    subspace = adapted.container.subspace
    if subspace is None:
        header, tensors = _with_stacks(adapted, include_factors)
    else:
        header, tensors = over_subspace(adapted.container.config, stacks(model), subspace)
        if include_subspace:
            header |= {INSIDE: subspace.header()}
            tensors |= {f"{INSIDE}.{name}": directions for name, directions in subspace.tensors().items()}
    tensors |= {f"trained.{name}": p for name, p in trained_beside(adapted).items()}
    tensors |= {f"state.{name}": b for name, b in _buffers_beside(adapted)}
    # A tensor with two names (tied weights) is copied and saved under both: safetensors refuses shared memory.
    content = {name: whole(t.detach()).cpu().contiguous().clone() for name, t in tensors.items()}
    broken = not_finite(content)
    if broken:
        raise ValueError(f"{broken[0]} has NaN or infinite values, so that no model could load it; {path} is as it was")

    def write() -> None:
        text = description(header, content)
        plain = subspace is None
        write_bytes(path, safetensors.torch.save(content, {HEADER: text}) if plain else pack(content, HEADER, text))

    if sharded_parameter(model) is None:
        write()
    else:
        write_in_first(path, write)
    return path


def _with_stacks(adapted: Adapted, include_factors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of the stacks, with what tells whether a base is the one they were trained on."""
    model = adapted.model
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, stack in stacks(model).items():
        tensors |= {f"{kind}.{name}": getattr(stack, kind) for kind in ("core", "rows", "columns")}
        base = base_weights(model, stack)
        if include_factors or is_of_quantised(stack) or stack.options.trainable == "all" or not stack.is_of(base):
            tensors |= {f"{kind}.{name}": getattr(stack, kind) for kind in ("col", "row")}
        described[name] = {
            "names": stack.names,
            "scale": stack.scale,
            "normalised": stack.normalised,
            "row_scores": stack.row_scores,
            "column_scores": stack.column_scores,
            "base_dtype": str(base.dtype).removeprefix("torch."),
            "fingerprint": fingerprint(base).tolist(),
        }
    return {"format": FORMAT, "config": adapted.container.config.to_json(every=False), "stacks": described}, tensors


def _buffers_beside(adapted: Adapted) -> Iterator[tuple[str, Tensor]]:
    """Buffers (running statistics) that training has changed, and those of modules that own a trained parameter."""
    owners = {name.rpartition(".")[0] for name in trained_beside(adapted)}
    changed = changed_buffers(adapted)
    return ((n, b) for n, b in buffers_beside(adapted.model) if n in changed or n.rpartition(".")[0] in owners)


def warn_of_others(model: nn.Module, adapted: Adapted) -> None:
    """Warn of trained parameters of a module around the adapted model, which no file for that model can hold."""
    inside = {id(p) for p in adapted.model.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if others:
        warnings.warn(
            f"the file has the adapter of {adapted.prefix.rstrip('.')}; {', '.join(others[:4])} "
            f"({len(others)} trained parameters of {type(model).__name__} around it) are not in it",
            stacklevel=3,
        )
