"""The options of an adapter's configuration as options of a method: ``tcur:selection=uniform:frequencies=2``."""

from __future__ import annotations

import random
import types
from dataclasses import fields, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.inject import attach, build_stack
from tcurlora_ext.adapter.model.ranks import stack_ranks
from tcurlora_ext.adapter.model.targets import Target, find_targets, group
from tcurlora_ext.segmentation.training import Sampler

from .base import Method, MethodOptions, Task, Unset

# Set by the run and by other methods, and the regexes for names, which are no names of folders.
_ELSEWHERE = ("seed", "factors", "target_modules", "exclude_modules")
_ONE_WORD = (bool, int, float, str)
ORDERS = ("network", "role", "random")
CALIBRATION_STEPS = 4  # whose windows the inputs of the layers are measured on, for selection=activation


def config_options(config: tcur.TCURConfig) -> dict[str, Any]:
    """The options of :class:`tcurlora_ext.TCURConfig` that a single word can give, with a configuration's values.

    Args:
        config: Its values are the defaults; an option that is None there has an :class:`Unset` of its type.
    """
    hints, found = get_type_hints(tcur.TCURConfig), {}
    for name in (field.name for field in fields(config) if field.name not in _ELSEWHERE):
        union = get_origin(hints[name]) in (Union, types.UnionType)
        kinds = [kind for kind in (get_args(hints[name]) if union else (hints[name],)) if kind in _ONE_WORD]
        if len(kinds) == 1:
            value = getattr(config, name)
            found[name] = Unset(kinds[0]) if value is None else value
    return found


def with_options(config: tcur.TCURConfig, method: Method, options: MethodOptions) -> tcur.TCURConfig:
    """A configuration with the options of a method, and the run's seed, rank and alpha where the method has none.

    Args:
        config: Where the method has no option for it.
        method: Its options may be those of :func:`config_options` and others.
        options: Those of the run.

    Raises:
        ValueError: The configuration refuses a value.
    """
    names = {field.name for field in fields(config)}
    own = {name: method.option(options, name) for name in method.options if name in names}
    own |= {name: getattr(options, name) for name in ("rank", "alpha") if own[name] is None}
    return replace(config, **own, seed=options.seed)


def calibrated(
    model: nn.Module, config: tcur.TCURConfig, task: Task | None
) -> tuple[tcur.TCURConfig, dict[str, Any]]:  # fmt: skip
    """A configuration, and the sizes of the layers' inputs on the training cases where its selection needs them.

    Without training cases, as when options are checked, the rule ``norm`` stands for ``activation``: the shapes are the
    same.
    """
    if config.selection != "activation":
        return config, {}
    if task is None:
        return replace(config, selection="norm"), {}
    sampler = Sampler(task.volumes, task.plan)
    batches = (sampler(step)[0].to(task.device) for step in range(CALIBRATION_STEPS))
    return config, {"calibration": tcur.calibrate(model.to(task.device), config, batches)}


def inject_in_order(model: nn.Module, config: tcur.TCURConfig, order: str, **given: Any) -> None:
    """As :func:`tcurlora_ext.inject`, with the layers of each stack in another order, in place.

    Args:
        model: The model.
        config: The configuration, whose seed draws a random order.
        order: "network": that in which the network registers them; "role": all blocks' layers of one role after
            another; or "random". The parts of a fused projection stay together.
        **given: As for :func:`tcurlora_ext.inject`.

    Raises:
        ValueError: The order is unknown, or as for :func:`tcurlora_ext.inject`.
    """
    if order not in ORDERS:
        raise ValueError(f"order is '{order}', expected one of {', '.join(ORDERS)}")
    if order == "network":
        tcur.inject(model, config, **given)
        return
    groups = {
        name: _ordered(members, order, config.seed)
        for name, members in group(find_targets(model, config), config).items()
    }
    ranks = stack_ranks(groups, config)
    stacks = {name: build_stack(name, members, config, ranks[name], **given) for name, members in groups.items()}
    attach(model, groups, stacks, config)


def _ordered(members: list[Target], order: str, seed: int) -> list[Target]:
    if order == "random":
        return random.Random(seed).sample(members, len(members))
    roles = list(dict.fromkeys(member.role for member in members))
    return sorted(members, key=lambda member: roles.index(member.role))
