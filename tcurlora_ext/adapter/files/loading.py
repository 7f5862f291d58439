"""Loading an adapter file onto a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.layer.parameter import HeldParameter
from tcurlora_ext.adapter.layer.uninitialised import refuse_uninitialised
from tcurlora_ext.adapter.model.effect import sample
from tcurlora_ext.adapter.model.inject import attach, learned_factors
from tcurlora_ext.adapter.model.parameters import named_layers, reads_itself
from tcurlora_ext.adapter.model.structure import (
    Adapted,
    adapted_layers,
    changed_buffers,
    find_adapted,
    module_of,
    stacks,
    trained_beside,
)
from tcurlora_ext.adapter.model.support import reason_against
from tcurlora_ext.adapter.model.targets import Target, stacked_weights
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.subspace import Subspace, opened
from tcurlora_ext.maths.fingerprint import fingerprint, mismatch
from tcurlora_ext.maths.selection import Selection

from .format import AdapterFile, read_adapter


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], subspace: Subspace | str | os.PathLike[str] | None = None
) -> nn.Module:
    """Load an adapter file onto a model, in place. No code from the file is run.

    Args:
        model: A model without adapter, which is then adapted as the file says; or a model adapted with the same
            stacks, which then gets the file's values and options; or a module around such a model.
        path: A file written by :func:`save_adapter`, or its folder.
        subspace: That of the adapter's learned factors, or the path of its file, where the adapter's file does not
            hold it and the model is not adapted over it.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its subspace is missing; a module or parameter is missing, quantised or of
            another shape; the base weights are not those on which the adapter was trained (unless the file holds the
            factors); a layer is merged; a parameter that trained with the model's present adapter is not in the file;
            the model is sharded over processes; or a lazy layer has seen no input. Nothing is changed.
    """
    whole, adapted = model, find_adapted(model)
    file = read_adapter(path, (opened(subspace), None if adapted is None else adapted.container.subspace))
    model = unwrapped(model)
    if adapted is not None:
        model = adapted.model
        _refuse_leftovers(adapted, file)
    refuse_sharded(model, f"load {file.path} before shard(model)")
    refuse_uninitialised(model)
    merged = next((name for name, layer in adapted_layers(model) if layer.merged), None)
    if merged is not None:
        raise ValueError(f"{merged} is merged: call unmerge(model) before loading {file.path}")
    groups = {name: _members(model, name, stack["names"], file.path) for name, stack in file.stacks.items()}
    others = _others(model, file)
    built = {name: _build(name, members, file) for name, members in groups.items()}
    if adapted is None:
        attach(model, groups, built, file.config, file.subspace)
    else:
        _take_over(adapted, built, file)
    for name, layer in adapted_layers(model):
        if f"{name}.weight" in file.under("trained"):
            layer.stack.hold_columns()  # C is columns of the weight before it trained
    with torch.no_grad():
        for destination, value in others:
            destination.copy_(value)
            if isinstance(destination, nn.Parameter):
                destination.requires_grad_(True)
    loaded = find_adapted(model)
    assert loaded is not None
    loaded.container.from_file = True
    loaded.container.loaded = set(file.under("trained")) | set(file.under("state"))
    for name in loaded.container.unfrozen.keys() & loaded.container.loaded:  # what the file set has not trained here
        loaded.container.unfrozen[name] = sample(model.get_parameter(name))
    return whole


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a wrapper of torch.compile, DataParallel or DistributedDataParallel, whose names a file has."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _refuse_leftovers(adapted: Adapted, file: AdapterFile) -> None:
    """Raise ValueError where the model would keep what another adapter has set, such as its head."""
    own = set(trained_beside(adapted)) | adapted.container.loaded | set(changed_buffers(adapted, tolerance=0.01))
    left = sorted(own - set(file.under("trained")) - set(file.under("state")))
    if left:
        raise ValueError(
            f"{file.path} does not have {', '.join(left[:4])} ({len(left)} in all), which trained with the adapter "
            "that the model holds and would stay; load it onto the base model"
        )


def _members(model: nn.Module, stack: str, names: list[str], path: Path) -> list[Target]:
    """The modules of a stack, given the names of its slices: ``name[0]``, ``name[1]``, ... are one fused module."""
    members: list[Target] = []
    here, readers = dict(named_layers(model)), reads_itself(model)
    for slice_name in names:
        name = module_of(slice_name, here)
        if members and members[-1].name == name:
            members[-1] = Target(name, members[-1].module, members[-1].slices + 1)
            continue
        if name not in here:
            raise ValueError(f"{path}: stack {stack} adapts {name}, which {type(model).__name__} does not have")
        module = here[name]
        reason = readers.get(name) or ("" if isinstance(module, TCURLayer) else reason_against(module))
        if reason:
            raise ValueError(f"{path}: {name} cannot be adapted: {reason}")
        members.append(Target(name, module))
    for member in members:
        if isinstance(member.module, HeldParameter) and member.slices != member.module.slices:
            raise ValueError(
                f"{path}: {member.name} has {member.slices} slices in the file, {member.module.slices} in the model"
            )
        out_features = Target(member.name, member.module).shape[0]
        if out_features % member.slices:
            raise ValueError(
                f"{path}: {member.name} has {out_features} output features, expected {member.slices} equal slices"
            )
    return members


def _others(model: nn.Module, file: AdapterFile) -> list[tuple[Tensor, Tensor]]:
    """What the file sets besides the stacks: (parameter or buffer of the model, value)."""
    found = []
    parameters = dict(model.named_parameters())
    parameters |= {f"{n}.weight": held.weight for n, held in named_layers(model) if isinstance(held, HeldParameter)}
    for kind, here in (("trained", parameters), ("state", dict(model.named_buffers()))):
        for name, value in file.under(kind).items():
            if name not in here:
                raise ValueError(f"{file.path}: {name} is in the file, but not in {type(model).__name__}")
            if here[name].shape != value.shape:
                raise ValueError(
                    f"{file.path}: {name} has shape {tuple(value.shape)} in the file, "
                    f"{tuple(here[name].shape)} in the model"
                )
            found.append((here[name], value))
    return found


def _build(name: str, members: list[Target], file: AdapterFile) -> TCURStack:
    """Build a stack of the file on the model's base weights."""
    described, config = file.stacks[name], file.config
    core, rows, columns = (file.tensors[f"{kind}.{name}"] for kind in ("core", "rows", "columns"))
    try:
        weights = stacked_weights(name, members)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    _, out_features, in_features = weights.shape
    row, column = (int(indices.max()) if len(indices) else -1 for indices in (rows, columns))
    if row >= out_features or column >= in_features:
        raise ValueError(
            f"{file.path}: stack {name} uses output feature {row} and input feature {column}, "
            f"but {members[0].name} is {out_features} x {in_features}"
        )
    factors = {kind: file.tensors[f"{kind}.{name}"] for kind in ("col", "row") if f"{kind}.{name}" in file.tensors}
    if not factors and file.subspace is None:
        _check_base(name, described, weights, file.path)
    chosen = Selection(
        rows.to(weights.device),
        columns.to(weights.device),
        torch.tensor(described["row_scores"], dtype=torch.float64),
        torch.tensor(described["column_scores"], dtype=torch.float64),
    )
    options = replace(
        config.stack_options((core.shape[1], core.shape[2])),
        scale=None if described["normalised"] else described["scale"],
    )
    try:
        learned = learned_factors(members, weights, options, config, file.subspace)
    except ValueError as error:
        raise ValueError(f"{file.path}: stack {name}: {error}") from None
    stack = TCURStack(weights, chosen, options, described["names"], learned)
    stack.scale = described["scale"]
    with torch.no_grad():
        stack.core.copy_(core)
        for kind, value in factors.items():
            expected = getattr(stack, kind).shape
            if value.shape != expected:
                raise ValueError(
                    f"{file.path}: {kind} of stack {name} has shape {tuple(value.shape)}, expected {tuple(expected)} "
                    f"for {members[0].name}"
                )
            getattr(stack, kind).copy_(value)
    return stack


def _check_base(name: str, described: Mapping[str, Any], weights: Tensor, path: Path) -> None:
    saved, found = torch.tensor(described["fingerprint"], dtype=torch.float64), fingerprint(weights)
    other = mismatch(saved, found, described["base_dtype"], weights.dtype)
    if other:
        at = other[0]
        raise ValueError(
            f"{path}: trained on other base weights: {len(other)} of {len(saved)} slices of stack {name} differ, first "
            f"{described['names'][at]} (norm {found[at, 0]:.6g} here, {saved[at, 0]:.6g} expected). Load it onto the "
            "weights it was trained on, or save it with include_factors=True"
        )


def _take_over(adapted: Adapted, built: dict[str, TCURStack], file: AdapterFile) -> None:
    """Copy the values and options of the file's stacks into those of a model that is adapted in the same way."""
    here = stacks(adapted.model)
    for name, stack in built.items():
        if here.keys() != built.keys() or _layout(here[name]) != _layout(stack):
            raise ValueError(
                f"{file.path}: its stacks ({_outline(built)}) are not those the model is adapted with "
                f"({_outline(here)}); call remove(model) first"
            )
    for name, stack in built.items():
        here[name].take_over(stack)
    adapted.container.config, adapted.container.subspace = file.config, file.subspace


def _layout(stack: TCURStack) -> tuple[object, ...]:
    options = stack.options
    return stack.names, stack.core.shape, options.transform, options.core_domain, options.trainable, options.factors


def _outline(stacks_: Mapping[str, TCURStack]) -> str:
    return ", ".join(f"{n}: {s.slices} slices, rank {s.rank}, {s.options.transform}" for n, s in stacks_.items())
