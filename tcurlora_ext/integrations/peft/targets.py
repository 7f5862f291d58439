"""The modules that a configuration of PEFT adapts, and the stacks that they form."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.layer.experts import HeldExperts
from tcurlora_ext.adapter.layer.parameter import HeldParameter
from tcurlora_ext.adapter.layer.uninitialised import refuse_uninitialised
from tcurlora_ext.adapter.model.blocks import bypassed, left_out_by_default
from tcurlora_ext.adapter.model.convolutions import left_out_among
from tcurlora_ext.adapter.model.parameters import named_layers
from tcurlora_ext.adapter.model.ranks import stack_ranks
from tcurlora_ext.adapter.model.support import (
    adapted_type,
    is_conv1d,
    is_convolution,
    is_made_anew,
    is_read_by_attention,
    reason_against,
)
from tcurlora_ext.adapter.model.targets import Target, group, is_no_name, left_out_for, matches, warn_unused
from tcurlora_ext.adapter.options import Rank, pair_of

from .config import TcurLoraConfig
from .quantised import QuantisedTarget, backend_of

T = TypeVar("T")

# PEFT adds all of a task's usual names for a head to modules_to_save, of which a model has one.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_READ = "nn.MultiheadAttention reads its weight and never calls it; use tcurlora_ext.inject, which adapts it"


def base_of(module: nn.Module) -> nn.Module:
    """The layer itself, without the layers that PEFT has wrapped around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    """Whether a base layer is a linear layer, not quantised, that its parent calls."""
    return (isinstance(module, nn.Linear) and not is_read_by_attention(module)) or is_conv1d(module)


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules, except those inside PEFT's layers."""
    inside = None
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        yield name, module
        if isinstance(module, BaseTunerLayer):
            inside = name + "."  # named_modules() gives the children of a module directly after it


def is_supported(module: nn.Module, model: nn.Module) -> bool:
    """Whether a base layer of the model can be adapted."""
    if is_convolution(module):
        return adapted_type(module) is not None
    return is_linear(module) or getattr(backend_of(module, model), "layer_type", None) == "linear"


def default_names(model: nn.Module, config: TcurLoraConfig) -> set[str]:
    """The names of the modules adapted by default, which are those that :func:`tcurlora_ext.inject` adapts.

    They are the parts after the block's number, or whole names where such a part also ends the name of another module.

    Raises ValueError where the default matches no module, or where an option needs names that hold for every block.
    """
    refuse_uninitialised(model)
    layers = {name: base_of(module) for name, module in outer_modules(model)}
    linear = {n: layer for n, layer in layers.items() if not is_convolution(layer) and is_supported(layer, model)}
    rank = max(pair_of(config.r))
    reasons = left_out_by_default(linear, model, rank, _made_anew, bypassed(model))
    if "" not in reasons.values():
        reasons |= left_out_among({n: layer for n, layer in layers.items() if is_convolution(layer)}, rank)
    found = {name: Target(name, layers[name]).role for name, reason in reasons.items() if not reason}
    if not found:
        reasons |= {name: _READ for name, layer in layers.items() if is_read_by_attention(layer)}
        why = left_out_for(reasons) or "; it has no linear layer or convolution"
        raise ValueError(
            f"Please specify `target_modules`: the default adapts none of the modules of {type(model).__name__}{why}"
        )
    whole, roles = _short_names(found, layers)
    if whole and (config.layers_to_transform is not None or config.layer_replication is not None):
        raise ValueError(
            "set `target_modules`: layers_to_transform and layer_replication need names that are those of one layer in "
            f"each block, which the default has not found for {', '.join(whole[:4])}"
        )
    return {*whole, *roles}


def _short_names(found: Mapping[str, str], names: Iterable[str]) -> tuple[list[str], set[str]]:
    """What names these modules and no other: whole names where a role does not, and the roles of all others.

    Args:
        found: The roles of the modules, by their names.
        names: Of all modules.
    """
    others = [name for name in names if name not in found]
    unclear = {role for role in set(found.values()) if not role or any(matches(name, [role]) for name in others)}
    return sorted(name for name, role in found.items() if role in unclear), set(found.values()) - unclear


def default_experts(model: nn.Module, config: TcurLoraConfig) -> list[str]:
    """The entries of ``target_parameters`` for the experts adapted by default; :func:`default_names` has the modules.

    With options that hold for modules of some blocks alone there are none; a warning says so.
    """
    held = _held_parameters(model)
    experts = {name: base for name, base in held.items() if isinstance(base, HeldExperts)}
    reasons = left_out_by_default(experts, model, max(pair_of(config.r)))
    found = {name: Target(name, experts[name]).role for name, reason in reasons.items() if not reason}
    left_out = config.exclude_modules or ()
    left_out = left_out if isinstance(left_out, str) else sorted(left_out)
    found = {name: role for name, role in found.items() if not matches(name, left_out)}
    for option in ("layers_to_transform", "layer_replication"):
        if found and getattr(config, option) is not None:
            warnings.warn(
                f"{option} holds for modules alone: the experts in {next(iter(found))} and {len(found) - 1} more "
                "parameters are not adapted; name them in target_parameters",
                stacklevel=2,
            )
            return []
    whole, roles = _short_names(found, held)
    return [*whole, *sorted(roles)]


def _held_parameters(model: nn.Module) -> dict[str, HeldParameter]:
    """The parameters in the place of layers, by name, without PEFT's layers around them."""
    named = ((name, base_of(module)) for name, module in named_layers(model) if not name.endswith(".base_layer"))
    return {name: base for name, base in named if isinstance(base, HeldParameter)}


def _made_anew(layer: nn.Module) -> str:
    return reason_against(layer) if is_made_anew(layer) else ""


def find_targets(model: nn.Module, config: TcurLoraConfig) -> list[Target]:
    """The modules that the configuration names, in registration order; "all-linear" in it is replaced by the names.

    Raises TypeError or ValueError where a module cannot be adapted; "all-linear" leaves it out with a warning. Warns of
    names in ``target_modules`` that no adapted module has.
    """
    refuse_uninitialised(model)
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    _maybe_include_all_linear_layers(config, model)
    if every:
        _leave_out(model, config)
    wanted = {name: module for name, module in outer_modules(model) if check_target_module_exists(config, name)}
    for name, reason in bypassed(model).items():
        if name in wanted:
            raise ValueError(f"{name}: {reason}")
    found = [as_target(name, module, model, config) for name, module in wanted.items()]
    found += parameter_targets(model, config)
    if found and config.target_modules is not None and not isinstance(config.target_modules, str):
        linear = [name for name, module in outer_modules(model) if is_supported(base_of(module), model)]
        warn_unused("target_modules", sorted(config.target_modules or ()), linear, model)
    return found


def parameter_targets(model: nn.Module, config: TcurLoraConfig) -> list[Target]:
    """The parameters that ``target_parameters`` names, in the order of their modules.

    Raises ValueError for an entry that names no parameter with all experts of a layer.
    """
    every = _held_parameters(model)
    entries = config.target_parameters or []
    for entry in entries:
        named = [name for name in every if matches(name, [entry])]
        other = next((name for name in named if not isinstance(every[name], HeldExperts)), None)
        if not named or other is not None:
            known = ", ".join(name for name, held in every.items() if isinstance(held, HeldExperts)) or "there are none"
            what = f"names {other}" if named else f"names no parameter of {type(model).__name__} that can be adapted"
            raise ValueError(
                f"target_parameters has {entry!r}, which {what}; expected parameters with all experts of a layer: "
                f"{known:.200}"
            )
    for name, held in every.items():
        if matches(name, entries) and reason_against(held):
            raise ValueError(f"{name} cannot be adapted: {reason_against(held)}")
    return [Target(name, held).split({}) for name, held in every.items() if matches(name, entries)]


def check_modules_to_save(model: nn.Module, config: TcurLoraConfig) -> None:
    """Raise ValueError where an entry of ``modules_to_save`` names no module: it would silently not train.

    In the configuration of a saved adapter it is a warning, so that an adapter that was saved with one still loads.
    """
    # As PEFT matches them: by the end of the name in a PeftModel, which need not begin at a dot.
    names = [f"base_model.model.{name}" for name, _ in model.named_modules(remove_duplicate=False)]
    added = _HEADS.get(config.task_type or "", ())
    for entry in config.modules_to_save or ():
        if entry not in added and not any(name.endswith(entry) for name in names):
            message = f"modules_to_save has {entry!r}, {is_no_name(entry, model)}"
            if not config.was_saved:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)


def _leave_out(model: nn.Module, config: TcurLoraConfig) -> None:
    """Remove from the names of all linear layers those that cannot be adapted, with a warning that says why."""
    uncalled = bypassed(model)
    reasons: dict[str, str] = {}
    for name, module in outer_modules(model):
        if not check_target_module_exists(config, name):
            continue
        if name in uncalled:
            reasons[name] = uncalled[name]
            continue
        try:
            as_target(name, module, model, config)
        except (TypeError, ValueError) as error:
            reasons[name] = str(error)
    if not reasons:
        return
    whole = {n for n, _ in outer_modules(model) if check_target_module_exists(config, n)}
    config.target_modules = whole - reasons.keys()
    first = {reason.split(": ", 1)[-1]: name for name, reason in reversed(reasons.items())}  # one name for each reason
    why = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
    warnings.warn(
        f"target_modules='all-linear' leaves out {', '.join(list(reasons)[:4])} ({len(reasons)} of {len(whole)} linear "
        f"layers): {why}",
        stacklevel=2,
    )


def with_names(config: TcurLoraConfig, model: nn.Module) -> TcurLoraConfig:
    """A copy of a configuration whose targets are given, for what finds them before an adapter is added.

    Raises ValueError where the default matches no module.
    """
    config = copy.copy(config)
    name_defaults(model, config)
    return config


def name_defaults(model: nn.Module, config: TcurLoraConfig) -> None:
    """Name in a configuration without targets what :func:`tcurlora_ext.inject` adapts by default.

    Raises ValueError as :func:`default_names` does.
    """
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = default_names(model, config)
        config.target_parameters = default_experts(model, config) or None


def find_groups(model: nn.Module, config: TcurLoraConfig) -> dict[str, list[Target]]:
    """The targets of every stack, by the stack's name. Raises as :func:`find_targets`."""
    return group(find_targets(model, config), config.for_stack(config.r, config.alpha))


def as_target(name: str, module: nn.Module, model: nn.Module, config: TcurLoraConfig) -> Target:
    """The target for a module that the configuration names. Raises TypeError or ValueError if it cannot be adapted."""
    base = base_of(module)
    if is_read_by_attention(base):
        raise TypeError(f"{name} cannot be adapted: {_READ}")
    if is_made_anew(base):
        raise TypeError(f"{name} cannot be adapted: {reason_against(base)}")
    if not is_supported(base, model):
        if is_convolution(base):
            raise TypeError(f"{name} cannot be adapted: {reason_against(base)}")
        raise TypeError(
            f"{name} is a {type(base).__name__}, expected a linear layer (torch.nn.Linear, transformers' Conv1D or a "
            "quantised one) that its parent calls, or a convolution"
        )
    backend = backend_of(base, model)
    if backend is not None and not backend.supports_merge:
        raise TypeError(
            f"{name} is quantised by {backend.backend_name}, expected a kind that PEFT can dequantise (bitsandbytes, "
            "HQQ, torchao): C and R are taken from the dequantised weight"
        )
    whole = Target(name, base) if backend is None else QuantisedTarget(name, base, backend=backend)
    return whole.split(config.split_fused)


def stack_configs(groups: Mapping[str, list[Target]], config: TcurLoraConfig) -> dict[str, TCURConfig]:
    """The configuration of every stack.

    Raises ValueError where the patterns give the layers of a stack different ranks or alphas, or where the budget is
    too small.
    """
    ranks: Mapping[str, Rank]
    if config.budget is None:
        ranks = {
            name: _common("rank", name, members, config.rank_pattern, config.r) for name, members in groups.items()
        }
    else:
        ranks = stack_ranks(groups, replace(config.for_stack(config.r, config.alpha), budget=config.budget))
    return {
        name: config.for_stack(ranks[name], _common("alpha", name, members, config.alpha_pattern, config.alpha))
        for name, members in groups.items()
    }


def rank_pattern(groups: Mapping[str, list[Target]], ranks: Mapping[str, tuple[int, int]]) -> dict[str, Rank]:
    """A ``rank_pattern`` of whole module names that gives every stack its own rank (c, r)."""
    short = {name: c if c == r else (c, r) for name, (c, r) in ranks.items()}
    return {f"^{re.escape(target.name)}$": short[name] for name, members in groups.items() for target in members}


def _common(kind: str, stack: str, members: list[Target], pattern: dict[str, T], default: T) -> T:
    values = [pattern.get(get_pattern_key(pattern.keys(), target.name), default) for target in members]
    for target, value in zip(members, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"{kind}_pattern gives {members[0].name} {kind} {values[0]} and {target.name} {kind} {value}, expected "
                f"one for both: they are slices of stack {stack} and share its core. "
                'stack_by="role" or "none" makes stacks of fewer layers'
            )
    return values[0]
