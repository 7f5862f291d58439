"""The adapter that ``inspect``, ``merge`` and ``to-lora`` read: of a run folder, or a file with or without its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tcurlora_ext.adapter.files.format import AdapterFile, read_adapter
from tcurlora_ext.adapter.files.loading import load_adapter
from tcurlora_ext.adapter.model.structure import stacks
from tcurlora_ext.cli.model_source import load_model


@dataclass(frozen=True)
class Adapted:
    """What :func:`open_adapted` found.

    Attributes:
        title: What was opened, for the first line of the output.
        folder: Where results go by default.
        model: The adapted model. None for an adapter file without its base.
        file: The adapter file. None for a run folder.
    """

    title: str
    folder: Path
    model: nn.Module | None
    file: AdapterFile | None


def open_adapted(
    source: Path, method: str, seed: int, model: str | None, kwargs: Mapping[str, Any], weights: Path | None
) -> Adapted:
    """Read a run folder of ``finetune``, or an adapter file, or a folder with adapter.safetensors in it.

    Args:
        source: The folder or file.
        method, seed: Which adapter of a run folder.
        model, kwargs, weights: The base of an adapter file: what :func:`load_model` takes.

    Raises:
        ValueError, OSError: Saying what was found and what was expected.
    """
    if (model is None) != (weights is None):
        given, other = ("model", "weights") if weights is None else ("weights", "model")
        raise ValueError(f"found --{given} without --{other}, expected both, or neither")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; expected a run of finetune or an adapter file")
    if (source / "network.json").is_file():
        if model is not None:
            raise ValueError(f"{source}: a run folder holds its base, expected no --model and no --weights")
        return _of_run(source, method, seed)
    if source.is_dir() and not (source / "adapter.safetensors").is_file():
        raise FileNotFoundError(
            f"{source}: found neither network.json nor adapter.safetensors in this folder, expected a run of finetune "
            "or an adapter file"
        )
    file = read_adapter(source)
    if model is None or weights is None:
        return Adapted(str(file.path), file.path.parent, None, file)
    return Adapted(
        f"{file.path} on {model}", file.path.parent, load_adapter(load_model(model, kwargs, weights), source), file
    )


def _of_run(folder: Path, method: str, seed: int) -> Adapted:
    from tcurlora_ext.segmentation.run import load_adapted

    network = load_adapted(folder, method, seed)
    if not stacks(network):
        raise ValueError(f"{folder}: method '{method}' has no stacks, expected a run of tCUR such as 'tcur'")
    return Adapted(f"{folder}, {method}, seed {seed}", folder, network, None)
