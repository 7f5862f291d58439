"""Which modules of a model are adapted, and which of them form a stack."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from tcurlora_ext.adapter.config import DEFAULT_SPLIT, TCURConfig
from tcurlora_ext.adapter.layer.experts import HeldExperts
from tcurlora_ext.adapter.layer.parameter import HeldParameter
from tcurlora_ext.adapter.layer.quantised import dequantised, is_quantised
from tcurlora_ext.adapter.layer.uninitialised import refuse_uninitialised
from tcurlora_ext.adapter.options import pair_of

from .blocks import DEFAULT_TARGETS as DEFAULT_TARGETS  # also known by this name
from .blocks import left_out_by_default
from .convolutions import convolutions_left_out
from .fused import parts_of
from .parameters import named_layers, quantised_experts, reads_itself
from .support import (
    EXPECTED,
    adapted_type,
    class_of,
    has_matrix,
    is_convolution,
    is_linear,
    matrix_of,
    reason_against,
    refuse,
)

# A layer of one of the experts in a list, as before transformers 5: its role is what stands after the expert's number.
_EXPERT = re.compile(r"(?P<experts>(.*\.)?experts)\.(\w+_)?\d+\.(?P<role>.+)")


@dataclass(frozen=True)
class Target:
    """A module to adapt. Its weight is ``slices`` slices of one shape, stacked by rows in a fused projection."""

    name: str
    module: nn.Module
    slices: int = 1

    @property
    def weight(self) -> Tensor:
        """The weight as slices (slices, out, in), detached, sharing memory; a quantised one is read anew each time."""
        if is_quantised(self.module):
            return dequantised(self.module).unflatten(0, (self.slices, -1))
        return self.as_slices(self.parameter.detach())

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight, as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def rows_of(self, x: Tensor) -> Tensor:
        """The tokens of an input, (T, features): the voxels of a convolution's, whose features are its channels."""
        if is_convolution(self.module):
            batched = x.dim() == self.parameter.dim()
            x = x.movedim(1 if batched else 0, -1)
        return x.reshape(-1, x.shape[-1])

    def as_slices(self, weight: Tensor) -> Tensor:
        """A tensor like the module's weight as slices (slices, out, in), sharing memory."""
        if isinstance(self.module, HeldParameter):
            return self.module.slices_of(weight, self.slices)
        return matrix_of(self.module, weight).unflatten(0, (self.slices, -1))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one slice."""
        if is_quantised(self.module):
            assert isinstance(self.module, nn.Linear)
            return self.module.out_features // self.slices, self.module.in_features
        _, out_features, in_features = self.weight.shape
        return out_features, in_features

    @property
    def form(self) -> tuple[int | str, ...]:
        """What the slices of a stack have in common: (out, in), or the shape of a convolution's weight and its kind.

        The shape is (out, in, k...); that of a transposed convolution begins with "transposed".
        """
        if not is_convolution(self.module):
            return self.shape
        first, second, *kernel = self.parameter.shape
        transposed = getattr(self.module, "transposed", False)
        return ("transposed", second, first, *kernel) if transposed else (first, second, *kernel)

    @property
    def tower(self) -> str:
        """The path of the module list that holds the blocks: the name up to its first number."""
        return self._around_numbers()[0]

    @property
    def role(self) -> str:
        """The path within the block: the name after its last number."""
        return self._around_numbers()[1]

    @property
    def block(self) -> str:
        """The path of the block: the name up to and including its last number."""
        return self.name[: len(self.name) - len(self.role)]

    def split(self, split_fused: Mapping[str, int]) -> Self:
        """This target with the number of slices that :func:`parts_of` gives it, which may raise ValueError.

        Experts, and the projections of nn.MultiheadAttention, have the number that they have; a convolution is one
        slice, whatever its name.
        """
        if isinstance(self.module, HeldParameter):
            return replace(self, slices=self.module.slices)
        if is_convolution(self.module):
            return self
        out_features, in_features = self.shape
        return replace(self, slices=parts_of(self.name, (out_features * self.slices, in_features), split_fused))

    def _around_numbers(self) -> tuple[str, str]:
        parts = self.name.split(".")
        at = [i for i, part in enumerate(parts) if part.isdigit()]
        return (".".join(parts[: at[0]]), ".".join(parts[at[-1] + 1 :])) if at else ("", self.name)


def matches(name: str, patterns: Sequence[str] | str | None) -> bool:
    """Whether a module's name matches: a regex for the whole name, or names, or ends of names in whole components."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


@contextmanager
def watching(targets: Iterable[Target], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context, call ``note`` with the name and the input of every target that is called."""

    def hook(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        note(name, arguments[0])

    handles = [target.module.register_forward_pre_hook(partial(hook, target.name)) for target in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_targets(model: nn.Module, config: TCURConfig) -> list[Target]:
    """The modules that the configuration names, or the default's, in registration order.

    The default's are the linear layers in repeated blocks (``blocks.py``), and where a model has none the convolutions
    (``convolutions.py``).

    Raises:
        ValueError: No module matches; a fused projection cannot be split as ``split_fused`` says; or a module cannot
            be adapted: because it is quantised in a way that PEFT cannot read, its weight is made anew in each call, or
            its parent does not call it; or a lazy layer has seen no input. The message names it.

    Warns:
        UserWarning: An entry of a list, or of ``split_fused``, names nothing that can be adapted; or modules that match
            are left out, because they are neither linear layers nor convolutions.
    """
    refuse_uninitialised(model)
    named = dict(named_layers(model))
    linear = [name for name, module in named.items() if adapted_type(module)]
    if config.target_modules is None:
        reasons = reasons_by_default(model, config)
        matching = {name: named[name] for name, reason in reasons.items() if not reason}
    else:
        matching = {name: module for name, module in named.items() if matches(name, config.target_modules)}
    matching = {name: module for name, module in matching.items() if not matches(name, config.exclude_modules)}
    for name, reason in quantised_experts(model).items():
        if matches(name, config.target_modules) and not matches(name, config.exclude_modules):
            raise ValueError(f"{name} cannot be adapted: {reason}, expected a floating dtype of 16 bits or more")
    if not matching:
        raise ValueError(_nothing_matches(model, config, linear))
    for name, reason in reads_itself(model).items():
        if name in matching:
            raise ValueError(f"{name} cannot be adapted: {reason}")
    for name, module in matching.items():
        if is_quantised(module):
            refuse(name, module)
    found = [_target(name, module, config) for name, module in matching.items() if adapted_type(module)]
    left_out = {name: module for name, module in matching.items() if not adapted_type(module)}
    if not found:
        kinds = sorted({class_of(module) for module in left_out.values()})
        raise ValueError(
            f"target_modules {config.target_modules!r} match {len(left_out)} modules, such as {next(iter(left_out))}, "
            f"but none that can be adapted: found {', '.join(kinds)}, {EXPECTED}"
        )
    unused = warn_unused("target_modules", config.target_modules, linear, model)
    warn_unused("exclude_modules", config.exclude_modules, list(named), model)
    if config.split_fused != DEFAULT_SPLIT:
        warn_unused("split_fused", list(config.split_fused), [target.name for target in found], model)
    left_out = {name: module for name, module in left_out.items() if has_matrix(module) and not matches(name, unused)}
    if left_out and config.target_modules is not None:
        name, module = next(iter(left_out.items()))
        warnings.warn(
            f"target_modules match {len(left_out)} modules that are left out, such as {name}: {reason_against(module)}",
            stacklevel=2,
        )
    return found


def reasons_by_default(model: nn.Module, config: TCURConfig) -> dict[str, str]:
    """Of every linear layer, adapted or not, why ``target_modules=None`` leaves it out; "" where it does not.

    Where it leaves out all of them, also of every convolution.
    """
    layers = {name: module for name, module in named_layers(model) if is_linear(module)}
    rank = max(pair_of(config.rank))
    reasons = left_out_by_default(layers, model, rank, uncalled=reads_itself(model))
    return reasons if "" in reasons.values() else reasons | convolutions_left_out(model, rank)


def _nothing_matches(model: nn.Module, config: TCURConfig, linear: Sequence[str]) -> str:
    wanted, kind = config.target_modules, type(model).__name__
    such_as = f"the {len(linear)} linear layers and convolutions of {kind}"
    such_as += f", such as {', '.join(linear[:4])}" if linear else " that can be adapted"
    if wanted is not None:
        hint = "; a string is a regex for the whole name, names go into a list" if isinstance(wanted, str) else ""
        return f"target_modules {wanted!r} match none of {such_as}{hint}"
    return f"the default adapts none of {such_as}{left_out_for(reasons_by_default(model, config))}; set target_modules"


def left_out_for(reasons: Mapping[str, str]) -> str:
    """The first two reasons, each with one layer that is left out for it, as they follow on a message; or "".

    Args:
        reasons: Of every layer, why it is left out; "" where it is not.
    """
    first: dict[str, str] = {}
    for name, reason in reasons.items():
        if reason:
            first.setdefault(reason, name)
    return "".join(f"; {name} is left out: {reason}" for reason, name in list(first.items())[:2])


def warn_unused(option: str, entries: Sequence[str] | str | None, names: Sequence[str], model: nn.Module) -> list[str]:
    """Warn of the entries of a list that none of ``names`` has, with what has them; a regex has matched as a whole."""
    entries = [] if entries is None or isinstance(entries, str) else entries
    unused = [entry for entry in entries if not any(matches(name, [entry]) for name in names)]
    for entry in unused:
        warnings.warn(f"{option} has {entry!r}, {_what_has(entry, model)}", stacklevel=4)
    return unused


def _what_has(entry: str, model: nn.Module) -> str:
    """What in a model has a name that no adapted layer has, and why it is not adapted; for messages."""
    for name, module in model.named_modules():
        if name and matches(name, [entry]):
            return f"but {name} cannot be adapted: {reason_against(module)}"
    for name, _ in model.named_parameters():
        if matches(name, [entry]):
            owner = class_of(model.get_submodule(name.rpartition(".")[0]))
            return f"but {name} is a parameter of a {owner}, no linear layer or convolution; it cannot be adapted"
    return is_no_name(entry, model)


def is_no_name(entry: str, model: nn.Module) -> str:
    """That no module has this name, and which names are near it; for messages about an entry of a list."""
    parts = entry.count(".") + 1
    ends = {".".join(name.split(".")[-parts:]) for name, _ in model.named_modules() if name}
    near = difflib.get_close_matches(entry, sorted(ends))
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"which no module of {type(model).__name__} is called{hint}"


def _target(name: str, module: nn.Module, config: TCURConfig) -> Target:
    refuse(name, module)
    return Target(name, module).split(config.split_fused)


def placed(members: Iterable[Target]) -> Iterator[tuple[Target, int]]:
    """The members of a stack, each with the index of its first slice."""
    first = 0
    for target in members:
        yield target, first
        first += target.slices


def slice_names(members: Sequence[Target]) -> list[str]:
    """The name of every slice: that of its module, with the number of the row block for a fused projection."""
    return [t.name if t.slices == 1 else f"{t.name}[{block}]" for t in members for block in range(t.slices)]


def stacked_weights(name: str, members: Sequence[Target]) -> Tensor:
    """The weights (S, out, in) of a stack's members. Raises ValueError where shapes, devices or dtypes differ."""
    first, stacked = members[0].weight[0], None
    for target, at in placed(members):
        if target.shape != members[0].shape:
            raise ValueError(
                f"stack {name}: {target.name} has slices of {target.shape}, expected {members[0].shape} as "
                f"{members[0].name}"
            )
        weight = target.weight  # read once and freed soon, because reading it may dequantise it
        if (weight.device, weight.dtype) != (first.device, first.dtype):
            raise ValueError(
                f"stack {name}: {target.name} is {weight.dtype} on {weight.device}, expected {first.dtype} on "
                f"{first.device} as {members[0].name}; stack_by='none', or stack_blocks=n for blocks of one device, "
                "makes stacks of fewer layers"
            )
        if stacked is None:
            stacked = weight.new_empty(sum(t.slices for t in members), *target.shape)
        stacked[at : at + target.slices] = weight
    assert stacked is not None
    return stacked


def group(targets: list[Target], config: TCURConfig) -> dict[str, list[Target]]:
    """The targets of every stack, by the stack's name.

    Raises ValueError where a function for ``stack_by`` puts different shapes into one stack.
    """
    groups: dict[object, list[Target]] = {}
    for target in targets:
        groups.setdefault(_key(target, config), []).append(target)
    if config.stack_blocks is not None:
        groups = dict(_runs(groups, config.stack_blocks))
    for key, members in groups.items():
        odd = next((t for t in members if t.form != members[0].form), None)
        if odd is not None:
            raise ValueError(
                f"stack {key!r} mixes shapes: {members[0].name} is {members[0].form}, {odd.name} is {odd.form}; "
                "the slices of a stack have one shape"
            )
    return dict(zip(_names(groups), groups.values(), strict=True))


def _key(target: Target, config: TCURConfig) -> object:
    if callable(config.stack_by):
        return config.stack_by(target.name, target.module)
    if isinstance(target.module, HeldExperts):
        return target.name, target.shape  # the experts of a layer are a stack of their own
    among = _EXPERT.fullmatch(target.name)
    if among and config.stack_by != "none":
        return f"{among['experts']}.{among['role']}", target.shape
    if config.stack_by == "none":
        return target.name
    if config.stack_by == "role":
        return target.tower, target.role, target.form
    return target.tower, target.form


def _runs(groups: Mapping[Any, list[Target]], blocks: int) -> Iterator[tuple[object, list[Target]]]:
    """Cut every group into runs of ``blocks`` consecutive blocks; the last run of a group may have fewer."""
    for (*key, shape), members in groups.items():
        order = list(dict.fromkeys(target.block for target in members))
        for run in range(0, len(order), blocks):
            yield (*key, run // blocks, shape), [t for t in members if t.block in order[run : run + blocks]]


def _names(groups: dict[object, list[Target]]) -> list[str]:
    """Short unique names of the stacks, without dots: shapes, with tower, role or key where shapes are not unique."""
    short = ["x".join(map(str, members[0].form)).replace("transposedx", "transposed_") for members in groups.values()]
    if len(set(short)) == len(short):
        return short
    long = []
    for key, shape in zip(groups, short, strict=True):
        parts = key[:-1] if isinstance(key, tuple) else (key,)
        label = "_".join(str(part) for part in parts if part != "")
        long.append(re.sub(r"\W+", "_", f"{label}_{shape}").strip("_"))
    return [name if long.count(name) == 1 else f"{name}_{long[: i + 1].count(name)}" for i, name in enumerate(long)]
