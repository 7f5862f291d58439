"""An adapter as a LoRA adapter in PEFT's file format, which engines that serve LoRA read without this package.

A folder with two files:

adapter_model.safetensors   ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``...lora_B.weight`` (out, rank)
    for every adapted module, of a convolution (rank, in, k...) and (out, rank, 1...), and the tensors of PEFT's
    ``modules_to_save`` under their names in the model
adapter_config.json         as PEFT's ``LoraConfig`` writes it

A module's output gets ``x A^T B^T * lora_alpha / r``. The scale is in B, so ``lora_alpha`` is r.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.linear import TCURConv1D, TCURLayer
from tcurlora_ext.adapter.layer.parameter import TCURParameter
from tcurlora_ext.adapter.model.effect import warn_without_effect
from tcurlora_ext.adapter.model.structure import CONTAINER, Adapted, adapted_layers, require_adapted, require_all_layers
from tcurlora_ext.adapter.model.whole_modules import modules_to_save, tensors_of
from tcurlora_ext.adapter.options import positive
from tcurlora_ext.adapter.stack.slices import LayerSlices
from tcurlora_ext.io.atomic import write_bytes, write_together
from tcurlora_ext.io.tensors import not_finite

from .saving import warn_of_others

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The modules within a LoRA layer of PEFT; "default" is the adapter. By modules_to_save PEFT would find them too.
OF_PEFT = (
    *("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "default"),
)
SHARDED = "save the adapter, load it onto the base in one process and call to_lora there"


@dataclass(frozen=True)
class LoraSource:
    """What a LoRA adapter is made from.

    Attributes:
        base: The model that is adapted.
        layers: The name of each adapted module -> its slices.
        others: The names of all modules of the base.
        transposed: Whether weights are stored as (in, out), as in transformers' Conv1D.
        beside: Tensors beside A and B, by the names they have in the file.
        options: Fields of PEFT's ``LoraConfig`` beside those of A and B.
        kernels: The shape of the weight of each adapted convolution, by its name.
    """

    base: nn.Module
    layers: Mapping[str, LayerSlices]
    others: Collection[str]
    transposed: bool
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Sequence[int]] = field(default_factory=dict)


class HasLoraSource(Protocol):
    """A module in a model that another library adapts, which knows what a LoRA adapter is made from."""

    def lora_source(self, adapter_name: str | None) -> LoraSource:
        """As for :func:`to_lora`; raises ValueError as it does."""


def to_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    max_rank: int = 512,
    adapter_name: str | None = None,
    beside: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model's adapter as a LoRA adapter in PEFT's file format: exact, since each dW is a product B A.

    ``PeftModel.from_pretrained(base, path)``, or an engine that serves LoRA (vLLM, SGLang, llama.cpp, ...), then gives
    the adapted model's output up to rounding, without this package. A and B are computed in float64 and rounded once,
    to the base's dtype, for a 16-bit base to float32. The scale is in B, so ``lora_alpha`` is r.

    The rank is r*S for a core that S slices share, c*S where that is smaller, and r where every slice has its own
    (``transform="identity"`` or ``stack_by="none"``). A fused projection of n slices has r*S too, but n*r where every
    slice has its own core. All modules get the largest rank; smaller ones are filled with zeros.

    A convolution is written where PEFT's LoRA computes the same: not a transposed one, with padding by zeros and a
    dilation of 1, which PEFT leaves out.

    Modules that were trained beside the cores, such as a norm or a head, become PEFT's ``modules_to_save``, with
    running statistics that training has changed. PEFT loads them, unless such a module has a name that ends like one
    of PEFT's own. vLLM refuses an adapter that has any. With ``beside`` they go into a file of weights instead, which
    the base loads before the adapter: ``base.load_state_dict(load_file(beside), strict=False)``. Dropout has no effect
    on the file.

    Args:
        model: A model adapted by :func:`inject`, merged or not; a ``PeftModel`` with a ``TcurLoraConfig``; or a module
            around one, such as a wrapper of DDP or torch.compile. Names in the file are those of the base.
        path: The folder, created where it is missing. A LoRA adapter in it is replaced when the new one is complete;
            other files in it stay.
        max_rank: The largest rank that is written; 512 is the largest that vLLM serves.
        adapter_name: The adapter of a ``PeftModel``; None: the active one.
        beside: The safetensors file for what was trained beside the cores, by its names in the base; it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not adapted, is a part of an adapted one or is sharded over processes; the rank is
            above ``max_rank``; a convolution is adapted that PEFT's LoRA computes otherwise; something that trained
            beside the cores is no whole module (the bias of an adapted layer, a parameter of the model itself); an
            adapted module is at two places in the model; a value is NaN or infinite; ``path`` is a file or has an
            adapter of another kind; or ``beside`` is given and nothing was trained there. Nothing is written.
        ModuleNotFoundError: PEFT, which writes the configuration, is not installed.
        OSError: The system refuses the folder or a file.

    Warns:
        UserWarning: A module around the adapted model has trained parameters, which are not written; or adapted layers
            were never called, or cores never trained, while others were.
    """
    found = next((module for module in model.modules() if hasattr(module, "lora_source")), None)
    if found is not None:
        return _write(cast("HasLoraSource", found).lora_source(adapter_name), Path(path), max_rank, beside)
    if adapter_name is not None:
        raise ValueError(
            f"adapter_name is {adapter_name!r}, expected None: {type(model).__name__} has no adapters of PEFT"
        )
    adapted = require_adapted(model)
    source = _source_of(adapted)
    warn_without_effect(adapted)
    warn_of_others(model, adapted)
    return _write(source, Path(path), max_rank, beside)


def _source_of(adapted: Adapted) -> LoraSource:
    """What the LoRA adapter of a model adapted by ``inject`` is made from."""
    require_all_layers(adapted)
    read = next((name for name, layer in adapted_layers(adapted.model) if isinstance(layer, TCURParameter)), None)
    if read is not None:
        raise ValueError(
            f"{read} is a parameter that the module around it reads (experts, nn.MultiheadAttention), which a LoRA "
            "adapter in PEFT's target_modules cannot name; use merge(model)"
        )
    refuse_sharded(adapted.model, SHARDED)
    _require_one_place(adapted)
    whole = modules_to_save(adapted)
    others = [name for name, _ in adapted.model.named_modules() if CONTAINER not in name.split(".")]
    return LoraSource(
        adapted.model,
        {name: layer.layer_slices for name, layer in adapted_layers(adapted.model)},
        others,
        any(isinstance(layer, TCURConv1D) for _, layer in adapted_layers(adapted.model)),
        {f"{PREFIX}{name}": value for name, value in tensors_of(whole).items()},
        {"modules_to_save": whole.names or None},
        conv_kernels(dict(adapted_layers(adapted.model))),
    )


def conv_kernels(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The weights' shapes of the convolutions among some layers.

    Raises ValueError, naming the first, where PEFT's LoRA of a convolution is not what the adapter computes.
    """
    found = {}
    for name, layer in layers.items():
        if not isinstance(layer, _ConvNd):
            continue
        if layer.transposed:
            other = f"is a {type(layer).__name__}, and PEFT's LoRA knows no transposed convolutions"
        elif set(layer.dilation) != {1}:
            other = f"has dilation {layer.dilation}, which PEFT's LoRA leaves out"
        elif layer.padding_mode != "zeros":
            other = f"pads by {layer.padding_mode!r}, and PEFT's LoRA by zeros"
        else:
            found[name] = tuple(layer.weight.shape)
            continue
        raise ValueError(
            f"{name} {other}, expected a convolution of dilation 1, padded by zeros; merge(model) keeps it"
        )
    return found


def _write(source: LoraSource, folder: Path, max_rank: int, beside: str | os.PathLike[str] | None) -> Path:
    _require_free(folder)
    # Copies, since safetensors refuses shared memory (tied weights). A and B are made here, for every layer anew.
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in source.beside.items()}
    if beside is None:
        tensors = dict(whole)
        _require_loadable(source.options.get("modules_to_save") or ())
    elif whole:
        tensors, source = {}, replace(source, options={**source.options, "modules_to_save": None})
    else:
        raise ValueError(f"beside: found {beside}, expected None: nothing was trained beside the cores")
    rank = _common_rank(source.layers, max_rank)
    config = _config(source, rank)
    for name, slices in source.layers.items():
        # 16-bit bases too: an engine casts A and B to its own dtype, and this way rounds them once, not twice.
        dtype = torch.promote_types(slices.stack.row.dtype, torch.float32)
        A, B = (_padded(factor, rank, dim).to(dtype) for dim, factor in enumerate(slices.lora_factors()))
        if name in source.kernels:
            A = A.unflatten(1, source.kernels[name][1:])
            B = B.reshape(*B.shape, *[1] * (A.dim() - 2))
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A.cpu(), f"{PREFIX}{name}.lora_B.weight": B.cpu()}
    broken = not_finite({**whole, **tensors})
    if broken:
        raise ValueError(f"{broken[0]} has NaN or infinite values, expected finite ones; {folder} is as it was")
    if beside is not None:
        state = {name.removeprefix(PREFIX): value for name, value in whole.items()}
        write_bytes(Path(beside), safetensors.torch.save(state, {"format": "pt"}))
    write_together(folder, {WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"}), CONFIG: config})
    return folder


def _require_free(folder: Path) -> None:
    """Raise ValueError where another file, or an adapter of another kind, is where the LoRA adapter is to be."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a folder or nothing")
    if not (folder / CONFIG).exists():
        return
    try:
        kind = json.loads((folder / CONFIG).read_bytes()).get("peft_type")
    except (ValueError, AttributeError):
        kind = None
    if kind != "LORA":
        raise ValueError(
            f"{folder}: holds an adapter of kind {kind}, whose files a LoRA adapter would replace; expected another "
            "folder"
        )


def _require_loadable(whole: Iterable[str]) -> None:
    """Raise ValueError for a name in modules_to_save by which PEFT would take parts of its own layers."""
    for name in whole:
        part = next((part for part in OF_PEFT if part.endswith(name)), None)
        if part is not None:
            raise ValueError(
                f"{name} (trained beside the cores) cannot be loaded as one of modules_to_save: PEFT goes by the ends "
                f"of names and would also take {part} of its own layers. Write what trained beside the "
                "cores to a file of its own (beside=FILE, --beside FILE), or use merge(model)"
            )


def _require_one_place(adapted: Adapted) -> None:
    """Raise ValueError where a module has two parents: PEFT, like most engines, adapts it in the first alone."""
    places: dict[int, str] = {}
    for name, parent in adapted.model.named_modules():
        for own, child in parent._modules.items():
            if isinstance(child, TCURLayer):
                here = f"{name}.{own}".lstrip(".")
                first = places.setdefault(id(child), here)
                if first != here:
                    raise ValueError(
                        f"{first} and {here} are one adapted module at two places; PEFT would adapt the first alone"
                    )


def _common_rank(layers: Mapping[str, LayerSlices], max_rank: int) -> int:
    positive("max_rank", max_rank)
    ranks = {name: slices.lora_rank() for name, slices in layers.items()}
    largest = max(ranks, key=ranks.__getitem__)
    if ranks[largest] > max_rank:
        stack = layers[largest].stack
        c, r = stack.rank
        raise ValueError(
            f"{largest}: the LoRA rank is {ranks[largest]}, expected at most max_rank = {max_rank}; its stack has rank "
            f"(c, r) = ({c}, {r}) and {stack.slices} slices. Train with a smaller rank, with stack_blocks or "
            'frequencies, or with a core for every slice: stack_by="none" or transform="identity"'
        )
    return ranks[largest]


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """The factor with zeros up to the common rank: a LoRA adapter with one rank is what every engine reads."""
    missing = rank - factor.shape[dim]
    return nn.functional.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))


def target_names(adapted: Collection[str], every: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for exactly these modules.

    A list of names also matches modules whose names end in ``.<name>``. Where there is one, a regex is the only form.

    Args:
        adapted: The names of the modules.
        every: The names of all modules of the model.
    """
    endings = tuple(f".{name}" for name in adapted)
    if any(name.endswith(endings) and name not in adapted for name in every):
        return "|".join(map(re.escape, adapted))
    return list(adapted)


def _config(source: LoraSource, rank: int) -> bytes:
    """The content of adapter_config.json, written by PEFT."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package 'peft' is not installed; expected it to write the configuration of a LoRA adapter: "
            "pip install 'tcurlora_ext[segmentation]' or pip install peft", name="peft",
        ) from error  # fmt: skip
    values = {"base_model_name_or_path": _name_of(source.base), "modules_to_save": None} | dict(source.options)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=source.transposed,
        inference_mode=True,
        **values,
    )
    config.target_modules = target_names(source.layers, source.others)  # LoraConfig would make it an unordered set
    kind = type(source.base)
    # What PEFT itself notes where the task is not known.
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder, auto_mapping_dict=None if config.task_type else mapping)
        return (Path(folder) / CONFIG).read_bytes()


def _name_of(base: nn.Module) -> str | None:
    """The name or folder that a transformers model was loaded from; None where it has none."""
    name = getattr(getattr(base, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None
