"""Learning factors on the layers that a configuration of PEFT names, for ``factors="learned"``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.learning.warmup import STEPS, Step, WarmUp, learn_stacks
from tcurlora_ext.adapter.model.structure import refuse_adapted
from tcurlora_ext.adapter.options import pair_of
from tcurlora_ext.adapter.subspace import Subspace

from .config import TcurLoraConfig
from .targets import find_groups, rank_pattern, stack_configs, with_names


def learn_factors(
    model: nn.Module, config: TcurLoraConfig, step: Step | Sequence[Step], steps: int = STEPS, **options: Any
) -> Subspace:
    """Learn factors in the modules that a configuration names, for ``TcurLoraConfig.subspace``.

    It works as :func:`tcurlora_ext.learn_factors` does: the whole weights train for a few steps and are put back. Of a
    PeftModel the base model trains, with its adapters disabled.

    Args:
        model: The model that will get the adapter.
        config: Names the modules and has the ranks, with ``factors="learned"`` or ``"learned_rows"``; it is not
            changed.
        step: Called with the model, of a PeftModel the base model, once a step; it returns the loss.
        steps: How many steps.
        **options: ``unfreeze``, ``unfreeze_lr``, ``lr``, ``ramp``, ``bits``, ``optimizer`` and ``parts``, as there.

    Returns:
        The subspace.

    Raises:
        ValueError: As :func:`tcurlora_ext.learn_factors`, and where the configuration's modules or ranks do not fit.
    """
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return learn_factors(model.get_base_model(), config, step, steps, **options)
    refuse_sharded(model, "call learn_factors before it is sharded")
    refuse_adapted(model)
    config = with_names(config, model)
    groups = find_groups(model, config)
    if not groups:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of {type(model).__name__}")
    ranks = {name: pair_of(of_stack.rank) for name, of_stack in stack_configs(groups, config).items()}
    names = dict.fromkeys(target.name for members in groups.values() for target in members)
    of_all = replace(
        config.for_stack(config.r, config.alpha),
        target_modules="|".join(map(re.escape, names)),
        rank_pattern={} if set(ranks.values()) == {pair_of(config.r)} else rank_pattern(groups, ranks),
    )
    return learn_stacks(model, of_all, groups, step, WarmUp(steps, **options))
