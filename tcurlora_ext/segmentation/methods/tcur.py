"""tCURLoRA (arXiv 2501.02227): one core for all weights of a shape, over columns and rows of the weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec, target_layers

from .base import Method, MethodOptions, Prepare, Task, Unset, beside
from .configuring import calibrated, config_options, inject_in_order, with_options
from .norms import affine_of_norms

SUBSPACE = "subspace.safetensors"  # the file of learned factors, beside the adapter


def inject(
    model: nn.Module, config: tcur.TCURConfig, spec: NetworkSpec, options: MethodOptions, order: str = "network",
    **given: Any,
) -> None:  # fmt: skip
    """Adapt the default's layers, with q, k and v as separate slices; the head or decoder trains too."""
    prefixes = prefixes_beside(spec, options)
    inject_in_order(model, but_for_trained(model, config, spec, options), order, **given)
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


def prepare(
    method: Method, config: tcur.TCURConfig, model: nn.Module, spec: NetworkSpec, options: MethodOptions,
    task: Task | None,
) -> None:  # fmt: skip
    """Adapt a model as a method's options say, and train its norms too if they say so.

    Args:
        method: With the options of :func:`options_over`.
        config: What its options do not say.
        model: The model.
        spec: Which parameters are the head and the decoder.
        options: Those of the run.
        task: The training cases, for ``selection=activation``.
    """
    config, given = calibrated(model, with_options(config, method, options), task)
    inject(model, config, spec, options, method.option(options, "order"), **given)
    if method.option(options, "norms"):
        tcur.unfreeze(model, [re.escape(name) for name in affine_of_norms(model)])


def options_over(config: tcur.TCURConfig, **changed: Any) -> dict[str, Any]:
    """The options of a method by :func:`prepare`: those of the configuration, the order of slices, and norms.

    Args:
        config: The defaults.
        **changed: Defaults that differ.
    """
    return config_options(config) | {"order": "network", "norms": False} | changed


CONFIG = tcur.TCURConfig.preset("paper")


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prepare(METHOD, CONFIG, model, spec, options, task)


# Of the learning rates only 1e-2 was tried. Without rank and alpha it has those of the run.
METHOD = Method(
    "tcur", "tCURLoRA", _prepare, 1e-2, save, load, "#d55e00", adapter=True,
    options=options_over(CONFIG, rank=Unset(int), alpha=Unset(float)), standard=True, merge=tcur.merge,
)  # fmt: skip
