"""Factors from a given change of a model's weights: a fine-tuned copy of it, or a LoRA adapter for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.layer.parameter import HeldParameter
from tcurlora_ext.adapter.layer.quantised import is_quantised
from tcurlora_ext.adapter.model.ranks import stack_ranks
from tcurlora_ext.adapter.model.structure import refuse_adapted
from tcurlora_ext.adapter.model.targets import Target, find_targets, group, slice_names, stacked_weights
from tcurlora_ext.adapter.options import WEIGHTS
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.adapter.subspace.subspace import directions_of
from tcurlora_ext.io.tensors import match_names, read_weights
from tcurlora_ext.maths.coding import CODED_BITS
from tcurlora_ext.maths.learned import leading_directions

Change = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def factors_of_change(
    model: nn.Module, config: TCURConfig | None, change: Change | list[Change], bits: int = CODED_BITS
) -> Subspace:
    """The factors that span a given change of a model's weights, in place of a warm-up of :func:`learn_factors`.

    Args:
        model: The base model, without adapter. It is not changed.
        config: As for :func:`learn_factors`.
        change: The changed model: a module of the same structure, its state, or a file of it (safetensors or a torch
            checkpoint, of which no code is run); or the folder of a LoRA adapter that PEFT wrote for this base, whose
            rank is at least that of the configuration. Of several, in a list, the sum of the changes is taken, each
            divided by its norm in the layer.
        bits: As for :func:`learn_factors`.

    Returns:
        The subspace, for :func:`inject`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The change has no weight of a layer, or of another shape; it is zero, not finite, or of too low a
            rank in a layer; or as for :func:`learn_factors`.
    """
    config = config or TCURConfig.preset("learned")
    require_learned(config)
    refuse_adapted(model)
    given = change if isinstance(change, list) else [change]
    if not given:
        raise ValueError("change is an empty list, expected one or more changed models")
    targets = find_targets(model, config)
    groups = group(targets, config)
    total: dict[str, Tensor] = {}
    for one in given:
        for name, part in _changes(model, targets, one).items():
            norm = float(part.norm())
            if len(given) > 1 and norm > 0:
                part = part / norm
            total[name] = total[name] + part if name in total else part
    about = {"learned by": "a given change", "changes": [_title(one) for one in given]}
    return subspace_of(groups, config, total, bits, about)


def require_learned(config: TCURConfig) -> None:
    """Raise ValueError where a configuration is for factors of the weights."""
    if config.factors == WEIGHTS:
        raise ValueError("factors is 'weights', expected 'learned' or 'learned_rows': TCURConfig.preset('learned')")


def subspace_of(
    groups: Mapping[str, Sequence[Target]],
    config: TCURConfig,
    changes: Mapping[str, Tensor],
    bits: int,
    about: Mapping[str, Any],
) -> Subspace:
    """The subspace of the changes of a model's layers.

    Args:
        groups: The targets of every stack.
        config: The configuration.
        changes: Name of a target -> its change (slices, out, in).
        bits: Bits of an entry.
        about: How it was learned.
    """
    ranks = stack_ranks(groups, config)
    stacks = {}
    for name, members in groups.items():
        change = torch.cat([changes[member.name] for member in members])
        try:
            found = leading_directions(change, ranks[name], config.along, config.frequencies)
            weights = stacked_weights(name, members)
            stacks[name] = directions_of(slice_names(members), weights, found, config, bits)
        except ValueError as error:
            raise ValueError(f"stack {name} ({members[0].name}, ...): {error}") from None
    return Subspace(config, bits, stacks, about)


def _changes(model: nn.Module, targets: list[Target], change: Change) -> dict[str, Tensor]:
    """The change of every target, (slices, out, in) float32."""
    if isinstance(change, (str, os.PathLike)):
        path = Path(change)
        adapter = (path / "adapter_config.json").exists()
        change = _with_lora(model, path) if adapter else match_names(read_weights(path), set(model.state_dict()))
    if isinstance(change, nn.Module):
        change = change.state_dict()
    found = {}
    for target in targets:
        key = target.name if isinstance(target.module, HeldParameter) else f"{target.name}.weight"
        if key not in change:
            raise ValueError(f"the changed model has no {key}; it has {', '.join(list(change)[:3])}, ...")
        if is_quantised(target.module):
            raise ValueError(f"{target.name} is quantised: take the factors from the model before it is quantised")
        weight, base = change[key], target.parameter.detach()
        if weight.shape != base.shape:
            raise ValueError(
                f"{key} of the changed model has shape {tuple(weight.shape)}, expected {tuple(base.shape)}"
            )
        part = target.as_slices(weight.detach().to(base.device).float() - base.float())
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"{key} of the changed model has NaN or infinite values, expected finite ones")
        found[target.name] = part
    return found


def _with_lora(model: nn.Module, folder: Path) -> nn.Module:
    """A copy of the model with a LoRA adapter of PEFT merged into its weights, in float32."""
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{folder} is an adapter of PEFT, and the package 'peft' is not installed: pip install peft", name="peft"
        ) from None
    merged = PeftModel.from_pretrained(copy.deepcopy(model).float(), str(folder)).merge_and_unload()
    assert isinstance(merged, nn.Module)
    return merged


def _title(change: Change) -> str:
    return str(change) if isinstance(change, (str, os.PathLike)) else type(change).__name__
