"""Adapting a whole model in place, and undoing it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.layer.parameter import HeldParameter, TCURParameter
from tcurlora_ext.adapter.layer.quantised import is_quantised
from tcurlora_ext.adapter.options import Rank, StackOptions, pair_of
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.factors import LearnedFactors
from tcurlora_ext.adapter.subspace import Subspace, opened

from .calibration import stack_inputs
from .coverage import coverage
from .effect import sample, watch_first_call
from .parameters import let_call, let_read, put_back, put_in_place
from .ranks import stack_ranks
from .structure import (
    CONTAINER,
    TCURStacks,
    adapted_layers,
    find_adapted,
    refuse_adapted,
    require_adapted,
    sums_of_buffers,
)
from .support import adapted_type, plain_type
from .targets import Target, find_targets, group, placed, slice_names, stacked_weights

_log = logging.getLogger("tcurlora_ext")


def inject(
    model: nn.Module,
    config: TCURConfig | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    subspace: Subspace | str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Adapt a model in place: all its parameters are frozen, and one core per stack is added, which trains.

    Until a core is trained, the output equals that of the model without adapter bit for bit. A fused projection with
    ``transform="identity"`` is an exception: its sums may be in another order.

    How many of the layers are adapted, and why others are left out, is logged at level INFO under the name
    ``tcurlora_ext``; :func:`tcurlora_ext.summary` says it at any time.

    Args:
        model: Any module whose weights have a floating dtype and are not on the meta device.
        config: By default that of the subspace; without one ``TCURConfig()``: the paper's selection at rank 8, in the
            linear layers of the blocks that the model repeats, or where there are none in the convolutions.
        calibration: The result of :func:`calibrate`; required by ``selection="activation"``, refused by other rules.
        subspace: Learned factors, of :func:`learn_factors`, or the path of a file; required by a configuration whose
            ``factors`` are not ``"weights"``, refused by others. The rank may be lower than that which was learned.

    Returns:
        The model itself. Its stacks are registered in it under ``tcur_stacks``: at its root, or, where the root is an
        ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict``, in its last adapted layer.

    Raises:
        ValueError: Nothing matches; a layer is already adapted, or cannot be adapted; the model is sharded over
            processes; shapes, devices or dtypes in a stack differ; the rank is larger than a side; a budget is too
            small; calibration inputs are missing, or given to a rule that takes none; weights are not finite; or the
            subspace is missing, or was learned for other layers, another transform, a lower rank or other weights. The
            message names the module, and nothing is changed.

    Warns:
        UserWarning: ``target_modules`` also match modules of other kinds, which are left out; or an entry of
            a list names nothing that can be adapted.
    """
    subspace = opened(subspace)
    config = config or (TCURConfig() if subspace is None else subspace.config)
    refuse_sharded(model, "call inject(model) before it is sharded")
    refuse_adapted(model)
    groups = group(find_targets(model, config), config)
    ranks = stack_ranks(groups, config)
    stacks = {
        name: build_stack(name, members, config, ranks[name], calibration, subspace) for name, members in groups.items()
    }
    attach(model, groups, stacks, config, subspace)
    if _log.isEnabledFor(logging.INFO):
        slices = {target.name: target.slices for members in groups.values() for target in members}
        _log.info("%s: %s", type(model).__name__, coverage(model, config, slices))
    return model


def attach(
    model: nn.Module,
    groups: dict[str, list[Target]],
    stacks: dict[str, TCURStack],
    config: TCURConfig,
    subspace: Subspace | None = None,
) -> nn.Module:
    """Replace the targets by adapted layers; the slices of a stack are in the order of the group's targets."""
    layers: dict[int, TCURLayer] = {}
    for name, members in groups.items():
        for target, first in placed(members):
            kind = adapted_type(target.module)
            assert kind is not None
            layer = kind.adopt(target.module)
            layer.attach(stacks[name], first, target.slices, owned=False)
            if isinstance(layer, TCURParameter):
                put_in_place(model, target.name, layer)
            else:
                layers[id(target.module)] = layer
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in layers:
                parent._modules[child_name] = layers[id(child)]
    let_call(model)
    owner, holder = "", model
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        owner, holder = list(adapted_layers(model))[-1]
    for stack in stacks.values():
        stack.holder = owner
    container = TCURStacks(stacks, config, owner, subspace)
    container.buffer_sums = sums_of_buffers(model)
    holder.add_module(CONTAINER, container)
    watch_first_call(model, container)
    return model


def build_stack(
    name: str,
    members: list[Target],
    config: TCURConfig,
    rank: Rank | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    subspace: Subspace | None = None,
) -> TCURStack:
    """Build the stack of these targets, with ``rank`` in place of the configuration's where it is given.

    Raises ValueError with the names of stack and module where their weights cannot form a stack.
    """
    try:
        weights, options = stacked_weights(name, members), config.stack_options(rank)
        return TCURStack.with_options(
            weights,
            options,
            inputs=None if calibration is None else stack_inputs(members, calibration),
            names=slice_names(members),
            learned=learned_factors(members, weights, options, config, subspace),
        )
    except ValueError as error:
        raise ValueError(f"stack {name} ({members[0].name}, ...): {error}") from None


def learned_factors(
    members: list[Target], weights: Tensor, options: StackOptions, config: TCURConfig, subspace: Subspace | None
) -> LearnedFactors | None:
    """The factors of a stack in a subspace; None where there is none. A quantised base need not be what it was."""
    if subspace is None:
        return None
    exact = not any(is_quantised(member.module) for member in members)
    return subspace.factors(slice_names(members), pair_of(options.rank), weights, config, exact)


def unfreeze(model: nn.Module, patterns: Sequence[str] | str) -> nn.Module:
    """Train more parameters than the cores.

    ``["decoder", "out"]`` trains UNETR's decoder5 to decoder2 and its output head. All parameters that train are saved
    with the adapter.

    Args:
        model: An adapted model.
        patterns: One or more prefixes of parameter names, or regexes that match from the start of a name.

    Returns:
        The model itself.

    Raises:
        ValueError: A pattern matches no parameter, or is no regex; nothing is changed.
    """
    chosen = parameters_named(model, patterns)
    adapted = find_adapted(model)
    trained = {id(parameter) for _, parameter in chosen}
    for _, layer in adapted_layers(model):
        if id(layer.weight) in trained:
            layer.stack.hold_columns()  # C is columns of the weight before it trains
    for name, parameter in chosen:
        parameter.requires_grad_(True)
        if adapted is not None:
            adapted.container.unfrozen.setdefault(name.removeprefix(adapted.prefix), sample(parameter))
    return model


def parameters_named(model: nn.Module, patterns: Sequence[str] | str) -> list[tuple[str, nn.Parameter]]:
    """The parameters outside the stacks whose names begin with one of the prefixes, or match one of the regexes.

    Raises ValueError where a pattern matches no parameter, or is no regex.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    parameters = [(name, p) for name, p in model.named_parameters() if f"{CONTAINER}." not in name]
    chosen = []
    for pattern in patterns:
        try:
            matching = [(name, p) for name, p in parameters if _begins_with(name, pattern)]
        except re.error as error:
            raise ValueError(f"unfreeze pattern {pattern!r} is neither a prefix nor a regex ({error})") from None
        if not matching:
            roots = sorted({name.split(".")[0] for name, _ in parameters})
            raise ValueError(f"unfreeze pattern {pattern!r} matches no parameter; names begin with {', '.join(roots)}")
        chosen += matching
    return chosen


def _begins_with(name: str, pattern: str) -> bool:
    return name.startswith(pattern) or re.match(pattern, name) is not None


def remove(model: nn.Module) -> nn.Module:
    """Replace the adapted layers by plain layers, in place. No parameter is changed, frozen or unfrozen.

    The layers of a merged model keep W + dW; all others have the base weight W.

    Args:
        model: An adapted model.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted.
    """
    container = require_adapted(model).container
    if container.first_call is not None:
        container.first_call.remove()
    named = list(adapted_layers(model))
    plain = {id(layer): layer.restore(plain_type(layer)) for _, layer in named}
    for name, adapted in named:
        held = plain[id(adapted)]
        if isinstance(held, HeldParameter):
            put_back(model, name, held)
    let_read(model)
    for layer in plain.values():
        layer._modules.pop(CONTAINER, None)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in plain:
                parent._modules[child_name] = plain[id(child)]
            elif isinstance(child, TCURStacks):
                del parent._modules[child_name]
    return model
