"""A new t-CUR adapter whose dW is exactly the weighted sum of the dW of other adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tcurlora_ext.adapter.model.targets import slice_names
from tcurlora_ext.adapter.options import WEIGHTS, fitting_pair
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths import folding

from .config import TcurLoraConfig
from .targets import find_groups, rank_pattern

COMBINATIONS = ("linear", "cat")
OF_THE_CORE = ("transform", "frequencies", "core_domain", "orthonormal")

Part = tuple[str, float, TCURStack]  # an adapter, its weight, its stack


def weighted_sum(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    configs: Mapping[str, TcurLoraConfig],
    stacks: Mapping[str, Mapping[str, TCURStack]],
    combination_type: str,
) -> tuple[TcurLoraConfig, dict[str, dict[str, Any]]]:
    """The adapter with ``dW = sum_i weights[i] * dW_i``: its configuration, and the tensors of each stack.

    "linear"  for adapters that chose the same columns and rows: the weighted sum of the cores.
    "cat"     for any choice: C = [C_1 C_2 ...], R = [R_1; R_2; ...] and a block-diagonal core; the rank is the sum of
              the ranks.

    Two stacks of different adapters must have either all layers in common or none. The result has the first adapter's
    scale and options.

    Args:
        model: The model with the adapters.
        adapters: Names of the adapters to sum.
        weights: The weight of each of them.
        configs: Their configurations, by adapter.
        stacks: Their stacks, by adapter and name of the stack.
        combination_type: "linear" or "cat".

    Raises:
        ValueError: The adapters have no such sum, or the rank becomes too large.
    """
    _check(adapters, weights, configs, combination_type)
    parts = [
        (name, weight, stack) for name, weight in zip(adapters, weights, strict=True) for stack in stacks[name].values()
    ]
    first = configs[adapters[0]]
    if combination_type == "cat" and first.factors != WEIGHTS:
        raise ValueError(
            f"adapter {adapters[0]} has learned factors, whose sums are 'linear': 'cat' would need the directions of "
            "both adapters in one subspace"
        )
    config = replace(
        first,
        target_modules={name.partition("[")[0] for *_, stack in parts for name in stack.names},
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        calibration=None if first.calibration is None else {},
    )
    groups = find_groups(model, config)
    combined = {
        name: _combined(_of_layers(name, slice_names(members), parts), combination_type)
        for name, members in groups.items()
    }
    ranks = {name: fitting_pair(tuple(v["core"].shape[1:]), groups[name][0].shape) for name, v in combined.items()}
    config.rank_pattern = rank_pattern(groups, ranks)
    return config, combined


def require_same(configs: dict[str, TcurLoraConfig]) -> None:
    """Raise ValueError where options differ that decide what a core means, for configurations by adapter name."""
    first, *others = configs
    for other in others:
        for field in ("factors", "subspace_digest"):
            here, there = (getattr(configs[name], field) for name in (first, other))
            if here != there:
                kind = "factors" if field == "factors" else "the subspace"
                raise ValueError(
                    f"{kind} is {str(here)[:12]} in adapter {first} and {str(there)[:12]} in {other}, expected the same"
                )
        for field in (*OF_THE_CORE, "scale"):
            here, there = (getattr(configs[name], field) for name in (first, other))
            # Two numbers may differ: cores are multiplied by the ratio. None beside a number may not: the same indices
            # then stand for different factors, of unit norm and raw.
            if here != there and (field != "scale" or None in (here, there)):
                raise ValueError(f"{field} is {here!r} in adapter {first} and {there!r} in {other}, expected the same")


def _check(
    adapters: Sequence[str],
    weights: Sequence[float],
    configs: Mapping[str, TcurLoraConfig],
    combination_type: str,
) -> None:
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type is {combination_type!r}, expected one of {', '.join(map(repr, COMBINATIONS))}: LoRA's "
            "others approximate the sum"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"found {len(adapters)} adapters and {len(weights)} weights, expected a weight for each")
    for name in adapters:
        config = configs[name]
        also: dict[str, Any] = {
            "modules_to_save": config.modules_to_save,
            "trainable_token_indices": config.trainable_token_indices,
        }
        also["bias"] = None if config.bias == "none" else config.bias
        for option, value in also.items():
            if value:
                raise ValueError(f"adapter {name} has {option} {value!r}, expected cores alone: these have no sum")
    require_same({name: configs[name] for name in adapters})


def _of_layers(stack: str, layers: list[str], parts: list[Part]) -> list[Part]:
    """The parts with exactly these layers. Raises ValueError where another part has some of them."""
    for name, _, other in parts:
        if other.names != layers and set(other.names) & set(layers):
            raise ValueError(
                f"the layers {', '.join(other.names)} are a stack of adapter {name}, and {', '.join(layers)} would be "
                f"stack {stack} of the sum, expected the same layers: stack_by='role' or 'none' makes stacks that agree"
            )
    own = [part for part in parts if part[2].names == layers]
    if not own:
        raise ValueError(f"{layers[0]} matches the name of an adapted layer, but no adapter has it")
    return own


def _combined(parts: list[Part], combination_type: str) -> dict[str, Any]:
    """The tensors of the stack whose dW is the sum of the parts."""
    stacks = [stack for *_, stack in parts]
    scale = next((stack.scale for stack in stacks if stack.scale), 1.0)
    cores = [weight * stack.scale / scale * stack.core.detach() for _, weight, stack in parts]
    values = {"scale": torch.tensor(scale, dtype=torch.float64)}
    if combination_type == "linear" or len(parts) == 1:
        _require_same_factors(parts)
        first = {"rows": stacks[0].rows.clone(), "columns": stacks[0].columns.clone()}
        return values | first | {"row": stacks[0].row, "col": stacks[0].col, "core": sum(cores)}
    return values | {
        "rows": torch.cat([stack.rows for stack in stacks]),
        "columns": torch.cat([stack.columns for stack in stacks]),
        "row": folding.join_rows([stack.row for stack in stacks], stacks[0].blocks),
        "col": folding.join_columns([stack.col for stack in stacks], stacks[0].blocks),
        "core": torch.stack([torch.block_diag(*blocks) for blocks in zip(*cores, strict=True)]),
    }


def _require_same_factors(parts: list[Part]) -> None:
    (first, _, one), *others = parts
    for name, _, other in others:
        for kind in ("columns", "rows", "col", "row"):
            here, there = getattr(one, kind), getattr(other, kind)
            if here.shape != there.shape or not torch.equal(here, there):
                raise ValueError(
                    f"adapters {first} and {name} have different {kind} in the stack of {one.names[0]}, expected the "
                    "same for 'linear'; combination_type='cat' adds them"
                )
