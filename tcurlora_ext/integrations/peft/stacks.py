"""The stacks of an adapter that is added through PEFT: computed from the base, or blank, for values loaded later."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.inject import build_stack
from tcurlora_ext.adapter.model.targets import Target, slice_names
from tcurlora_ext.adapter.options import LEARNED, WEIGHTS, pair_of
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.factors import LearnedFactors
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.maths.selection import Selection

from .config import TcurLoraConfig

RANDOM_CORE = 0.1  # standard deviation of the core with init_weights=False


def new_stack(
    name: str,
    members: list[Target],
    of_stack: TCURConfig,
    config: TcurLoraConfig,
    on_meta: bool,
    subspace: Subspace | None,
) -> TCURStack:
    """A stack of these targets.

    Args:
        name: The stack's name, for errors.
        members: The targets, whose slices are those of the stack in this order.
        of_stack: The configuration of this stack.
        config: The configuration of the adapter.
        on_meta: Build it on the meta device, for values that are loaded later.
        subspace: The adapter's, where its factors are learned. None while a checkpoint is still to bring it: the
            factors are NaN until then.

    Raises:
        ValueError: Calibrated inputs are to choose the columns and the configuration has none, or the weights do not
            fit the configuration or the subspace.
    """
    if on_meta:
        return _blank(members, of_stack).to("meta")
    if subspace is None and of_stack.factors != WEIGHTS:
        stack = _blank(members, of_stack)
        stack.row.fill_(torch.nan)
        stack.col.fill_(torch.nan)
        # PEFT may create all parameters on meta, for values that are assigned.
        return stack.to("meta" if stack.core.is_meta else members[0].weight.device)
    if config.selection == "activation" and not config.calibration:
        if config.calibration is None:
            raise ValueError(
                f"stack {name}: selection is 'activation' and calibration None, expected the result of "
                "calibrate(model, config, batches)"
            )
        of_stack = replace(of_stack, selection="norm")  # the indices that "activation" chose are loaded afterwards
    stack = build_stack(name, members, of_stack, calibration=config.calibration or None, subspace=subspace)
    if not config.init_weights:
        nn.init.normal_(stack.core, std=RANDOM_CORE)
    return stack


def _blank(members: list[Target], config: TCURConfig) -> TCURStack:
    """A stack of the right shapes, built without reading the base weights."""
    slices = sum(target.slices for target in members)
    ones = torch.ones((), dtype=members[0].weight.dtype).expand(slices, *members[0].shape)
    c, r = pair_of(config.rank)
    learned, options = None, config.stack_options()
    columns = 0 if config.factors == LEARNED else c
    rows = r if config.factors == WEIGHTS else 0
    if config.factors != WEIGHTS:
        out_features, in_features = members[0].shape
        learned = LearnedFactors(torch.ones(slices, out_features, c), torch.ones(slices, r, in_features))
    first = Selection(torch.arange(rows), torch.arange(columns), torch.zeros(rows), torch.zeros(columns))
    # Equal columns cannot be made orthonormal.
    stack = TCURStack(ones, first, replace(options, orthonormal=False), slice_names(members), learned)
    stack.options = options
    return stack
