"""tCURLoRA (arXiv 2501.02227): one core for all weights of a shape, over columns and rows of the weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec, target_layers

from .base import Method, MethodOptions, Prepare, Task, beside
from .norms import affine_of_norms

SUBSPACE = "subspace.safetensors"  # the file of learned factors, beside the adapter


def inject(model: nn.Module, config: tcur.TCURConfig, spec: NetworkSpec, options: MethodOptions, **given: Any) -> None:
    """Adapt the default's layers, with q, k and v as separate slices; the head or decoder trains too."""
    prefixes = prefixes_beside(spec, options)
    tcur.inject(model, but_for_trained(model, config, spec, options), **given)
    tcur.unfreeze(model, prefixes)


def but_for_trained(
    model: nn.Module, config: tcur.TCURConfig, spec: NetworkSpec, options: MethodOptions
) -> tcur.TCURConfig:
    """The configuration without the layers that train whole beside the adapter: convolutions of a decoder."""
    prefixes = beside(spec, options)
    layers = target_layers(model)
    if layers == target_layers(model, prefixes):
        return config
    return replace(config, exclude_modules=rf"({'|'.join(map(re.escape, prefixes))}).*")


def prefixes_beside(spec: NetworkSpec, options: MethodOptions) -> list[str]:
    """What trains beside the adapter, as patterns for :func:`tcurlora_ext.unfreeze`."""
    return [re.escape(prefix) for prefix in beside(spec, options)]


def save(model: nn.Module, path: Path, options: MethodOptions) -> None:
    """Write the adapter."""
    tcur.save_adapter(model, path)  # writes atomically by itself


def load(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    """Load the adapter, with the subspace beside it where there is one."""
    beside_it = path.parent / SUBSPACE
    tcur.load_adapter(model, path, tcur.Subspace.load(beside_it) if beside_it.is_file() else None)


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    config = tcur.TCURConfig(
        rank=METHOD.option(options, "rank") or options.rank, alpha=METHOD.option(options, "alpha") or options.alpha,
        seed=options.seed, selection=METHOD.option(options, "selection"), stack_by=METHOD.option(options, "stack_by"),
        transform=METHOD.option(options, "transform"), orthonormal=METHOD.option(options, "orthonormal"),
    )  # fmt: skip
    inject(model, config, spec, options)
    if METHOD.option(options, "norms"):
        tcur.unfreeze(model, [re.escape(name) for name in affine_of_norms(model)])


# Of the learning rates only 1e-2 was tried. Rank and alpha 0 stand for the run's options --rank and --alpha.
METHOD = Method(
    "tcur", "tCURLoRA", _prepare, 1e-2, save, load, "#d55e00", adapter=True,
    options={"rank": 0, "alpha": 0.0, "orthonormal": False, "selection": "norm", "stack_by": "shape",
             "transform": "dft", "norms": False}, standard=True, merge=tcur.merge,
)  # fmt: skip
