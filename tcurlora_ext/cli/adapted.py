"""The adapter that ``inspect``, ``merge`` and ``to-lora`` read: of a run folder, or a file with or without its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tcurlora_ext.adapter.files.format import AdapterFile, read_adapter
from tcurlora_ext.adapter.files.loading import load_adapter
from tcurlora_ext.adapter.model.inject import inject
from tcurlora_ext.adapter.model.structure import require_adapted, stacks
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.adapter.subspace.files import is_subspace
from tcurlora_ext.cli.model_source import load_model


@dataclass(frozen=True)
class Adapted:
    """What :func:`open_adapted` found.

    Attributes:
        title: What was opened, for the first line of the output.
        folder: Where results go by default.
        model: The adapted model. None for a file without its base.
        file: The adapter file. None for a run folder, and for the file of a subspace.
        source: The folder or file, as it was given.
        subspace: What learned factors come from.
        of_subspace: Whether this is the file of a subspace; then ``model`` is its base, adapted over it.
    """

    title: str
    folder: Path
    model: nn.Module | None
    file: AdapterFile | None
    source: Path
    subspace: Subspace | None = None
    of_subspace: bool = False

    def require_adapter(self) -> nn.Module:
        """The adapted model. Raises ValueError where there is no adapter, or no base."""
        if self.of_subspace:
            raise ValueError(f"{self.title}: found the file of a subspace, expected an adapter over it")
        if self.model is None:
            assert self.file is not None
            raise ValueError(
                f"{self.source}: an adapter file alone holds no base weights, expected --model and --weights beside it"
            )
        return self.model


def open_adapted(
    source: Path,
    method: str | None,
    seed: int,
    model: str | None,
    kwargs: Mapping[str, Any],
    weights: Path | None,
    subspace: Path | None = None,
) -> Adapted:
    """Read a run folder of ``finetune``, an adapter file or its folder, or the file of a subspace.

    Args:
        source: The folder or file.
        method, seed: Which adapter of a run folder; without a method that of :func:`method_of_run`.
        model, kwargs, weights: The base of a file: what :func:`load_model` takes.
        subspace: The file of the subspace that an adapter file names by its digest alone.

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
        if subspace is not None:
            raise ValueError(f"{source}: a run folder holds its adapters whole, expected no --subspace")
        return _of_run(source, method, seed)
    if source.is_dir() and not (source / "adapter.safetensors").is_file():
        raise FileNotFoundError(
            f"{source}: found neither network.json nor adapter.safetensors in this folder, expected a run of finetune "
            "or an adapter file"
        )
    base = None if model is None or weights is None else load_model(model, kwargs, weights)
    on = "" if base is None else f" on {model}"
    if source.is_file() and is_subspace(source):
        if subspace is not None:
            raise ValueError(f"{source}: found the file of a subspace, expected an adapter with --subspace")
        found = Subspace.load(source)
        over = None if base is None else inject(base, subspace=found)
        return Adapted(f"{source}{on}", source.parent, over, None, source, found, of_subspace=True)
    beside = None if subspace is None else Subspace.load(subspace)
    file = read_adapter(source, (beside,))
    loaded = None if base is None else load_adapter(base, source, beside)
    return Adapted(f"{file.path}{on}", file.path.parent, loaded, file, source, file.subspace)


def _of_run(folder: Path, method: str | None, seed: int) -> Adapted:
    from tcurlora_ext.segmentation.methods import folder_name
    from tcurlora_ext.segmentation.runs.network import load_adapted

    method = method_of_run(folder, method)
    network = load_adapted(folder, method, seed)
    if not stacks(network):
        raise ValueError(f"{folder}: method '{method}' has no stacks of tCUR, expected a method such as 'tcur'")
    subspace = require_adapted(network).container.subspace
    own = folder / folder_name(method) / f"seed{seed}"
    return Adapted(f"{folder}, {method}, seed {seed}", own, network, None, folder, subspace)


def is_tcur(method: str) -> bool:
    """Whether a method of `finetune`, with or without options, adapts by stacks of tCUR."""
    from tcurlora_ext.adapter.model.merge import merge
    from tcurlora_ext.segmentation.methods import METHODS, base_name

    known = METHODS.get(base_name(method))
    return known is not None and known.merge is merge


def method_of_run(folder: Path, method: str | None) -> str:
    """The method to take of a run: the one given, else "tcur", else the only one of tCUR.

    Args:
        folder: The run folder.
        method: As given, or None.

    Raises:
        ValueError: There are several, and none is just "tcur"; the message lists them.
    """
    from tcurlora_ext.segmentation.prediction.predictor import PREFERRED, open_run

    if method is not None or not (folder / "run.json").is_file():
        return method or PREFERRED
    own = [name for name in open_run(folder).seeds if is_tcur(name)]
    if PREFERRED in own or not own:
        return PREFERRED
    if len(own) > 1:
        raise ValueError(f"{folder}: found the methods {', '.join(own)} of tCUR, expected --method with one of them")
    return own[0]
