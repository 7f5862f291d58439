"""Which of a model's weights an adapter covers, and why it leaves the others out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.layer.experts import HeldExperts
from tcurlora_ext.adapter.layer.linear import TCURLayer

from .parameters import named_layers, reads_itself
from .structure import CONTAINER
from .support import class_of, features_of, is_convolution, is_linear, reason_against
from .targets import find_targets, matches, reasons_by_default

CONVOLUTION = "a convolution"
EXPERTS = "3-D, as the experts of a layer in one parameter"


@dataclass(frozen=True)
class Part:
    """One weight of a model: a matrix or a tensor of more dimensions.

    Attributes:
        name: The name of its module; of its parameter where that is not called ``weight``.
        kind: "linear", "experts" (those of a layer in one parameter), "convolution", "embedding" or "parameter".
        shape: (out, in) of a linear layer, otherwise the parameter's shape.
        slices: How many slices of a stack it is; 0 where it is left out.
        reason: Why it is left out; "" where it is adapted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int
    reason: str

    @property
    def weights(self) -> int:
        """The number of its entries."""
        return prod(self.shape)

    @property
    def pattern(self) -> str:
        """The name with * in place of its numbers."""
        return re.sub(r"(?<![^._])\d+(?=\.|$)", "*", self.name)


@dataclass(frozen=True)
class Group:
    """The parts whose names agree up to numbers and that are adapted, or left out for one reason.

    Attributes:
        name: Their common name, with * in place of numbers.
        kind, slices, reason: Those of each part.
        layers: The number of parts.
        weights: The number of entries of all of them.
    """

    name: str
    kind: str
    slices: int
    reason: str
    layers: int
    weights: int


@dataclass(frozen=True)
class Coverage:
    """The weights of a model, each with why it is left out; ``str()`` says it in a line."""

    parts: tuple[Part, ...]

    @property
    def linear(self) -> tuple[Part, ...]:
        """The linear layers, with the projections of nn.MultiheadAttention."""
        return tuple(part for part in self.parts if part.kind == "linear")

    @property
    def experts(self) -> tuple[Part, ...]:
        """The parameters that have the weights of all experts of a layer, and can be adapted."""
        return tuple(part for part in self.parts if part.kind == "experts")

    @property
    def convolutions(self) -> tuple[Part, ...]:
        """The convolutions where some of them are adapted; none otherwise."""
        found = tuple(part for part in self.parts if part.kind == "convolution")
        return found if any(part.slices for part in found) else ()

    @property
    def adapted(self) -> tuple[Part, ...]:
        """All that is adapted, linear layers and parameters of experts."""
        return tuple(part for part in self.parts if part.slices)

    @property
    def adapted_linear(self) -> tuple[Part, ...]:
        """The linear layers that are adapted."""
        return tuple(part for part in self.linear if part.slices)

    @property
    def adapted_layers(self) -> tuple[Part, ...]:
        """The linear layers and the convolutions that are adapted, without the parameters of experts."""
        return tuple(part for part in (*self.linear, *self.convolutions) if part.slices)

    @property
    def left_out(self) -> tuple[Part, ...]:
        """The linear layers, and where some are adapted the convolutions, that are not adapted."""
        return tuple(part for part in (*self.linear, *self.convolutions) if not part.slices)

    @property
    def share_of_all(self) -> float:
        """The share of all weights that are adapted, 0 to 1."""
        return sum(part.weights for part in self.adapted) / max(1, sum(part.weights for part in self.parts))

    @property
    def share(self) -> float:
        """The share of the weights of linear layers, and where some are adapted of convolutions, that is adapted.

        It is from 0 to 1, and 0 where there are no such weights. Parameters of experts do not count.
        """
        every = sum(part.weights for part in (*self.linear, *self.convolutions))
        return sum(part.weights for part in self.adapted_layers) / max(1, every)

    def groups(self) -> list[Group]:
        """The parts in groups of one name, kind and reason, in the order of their first parts."""
        found: dict[tuple[str, str, int, str], list[Part]] = {}
        for part in self.parts:
            found.setdefault((part.pattern, part.kind, part.slices, part.reason), []).append(part)
        return [Group(*key, len(parts), sum(part.weights for part in parts)) for key, parts in found.items()]

    def to_json(self) -> dict[str, Any]:
        """The counts, and :meth:`groups`, as values that JSON can hold."""
        return {
            "adapted": len(self.adapted_layers), "linear": len(self.linear),
            "convolutions": len(self.convolutions), "share": self.share,
            "share_of_all": self.share_of_all, "groups": [asdict(group) for group in self.groups()],
        }  # fmt: skip

    def __str__(self) -> str:
        kinds = {"linear layers": self.linear, "convolutions": self.convolutions}
        if self.convolutions and not self.adapted_linear:
            del kinds["linear layers"]
        counts = [f"{_of(parts)} {kind}" for kind, parts in kinds.items() if parts]
        line = f"adapted: {' and '.join(counts) or '0 of 0 linear layers'}, {self.share:.0%} of their weights"
        if self.experts:
            line += f", and {_of(self.experts)} parameters with all experts of a layer"
        beside: dict[str, int] = {}
        for part in self.parts:
            if part.reason in (CONVOLUTION, EXPERTS):
                beside[part.reason] = beside.get(part.reason, 0) + part.weights
        names = [f"{part.name} ({part.reason})" for part in self.left_out[:4]]
        more = f" and {len(self.left_out) - 4} more" if len(self.left_out) > 4 else ""
        others = [f"{weights:,} weights that are {reason}" for reason, weights in beside.items()]
        return line + (f"; left out: {', '.join(names)}{more}" if names else "") + "".join(f"; {o}" for o in others)


def coverage(model: nn.Module, config: TCURConfig, adapted: Mapping[str, int] | None = None) -> Coverage:
    """What an adapter covers of a model.

    Args:
        model: The model, adapted or not; it may be on the meta device.
        config: The adapter's configuration.
        adapted: The number of slices of each adapted layer by name; None: of those that the configuration names.

    Raises:
        ValueError: As :func:`find_targets` does, where ``adapted`` is None.
    """
    if adapted is None:
        adapted = {target.name: target.slices for target in find_targets(model, config)}
    reasons = reasons_by_default(model, config) if config.target_modules is None else {}
    reasons = reads_itself(model) | reasons

    def reason(name: str, module: nn.Module) -> str:
        if matches(name, config.exclude_modules):
            return "in exclude_modules"
        if reasons.get(name):
            return reasons[name]
        why = "" if isinstance(module, TCURLayer) else reason_against(module)
        return why or ("not in the adapter" if config.target_modules is None else "not in target_modules")

    parts: list[Part] = []
    layers = [("", model), *named_layers(model)]
    tied = {id(module.weight) for _, module in layers if is_linear(module)}
    convolutions = any(name in adapted for name, module in layers if is_convolution(module))
    for name, module in layers:
        if CONTAINER in name.split("."):
            continue
        if is_linear(module):
            slices = adapted.get(name, 0)
            kind = "linear"
            shape: tuple[int, ...] = features_of(module)
            if isinstance(module, HeldExperts):
                kind, shape = "experts", tuple(module.weight.shape)
            parts.append(Part(name, kind, shape, slices, "" if slices else reason(name, module)))
        elif is_convolution(module) and convolutions and isinstance(module.weight, Tensor):
            slices, shape = adapted.get(name, 0), tuple(module.weight.shape)
            parts.append(Part(name, "convolution", shape, slices, "" if slices else reason(name, module)))
        else:
            parts += _other_weights(name, module, tied)
    return Coverage(tuple(parts))


def _of(parts: tuple[Part, ...]) -> str:
    return f"{sum(part.slices > 0 for part in parts)} of {len(parts)}"


def _other_weights(name: str, module: nn.Module, tied: set[int]) -> Iterator[Part]:
    """The weights of a module that is no linear layer: its own parameters of two or more dimensions.

    One that is ``tied`` to a linear layer, as an embedding to the output layer, is that layer's.
    """
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() < 2 or id(parameter) in tied:
            continue
        called = name if own == "weight" else f"{name}.{own}".lstrip(".")
        if is_convolution(module):
            kind, reason = "convolution", CONVOLUTION
        elif isinstance(module, nn.Embedding):
            kind, reason = "embedding", "an embedding"
        elif parameter.dim() == 3 and re.search("expert", f"{type(module).__name__} {called}", re.IGNORECASE):
            kind, reason = "parameter", EXPERTS
        elif re.search("router", f"{type(module).__name__} {called}", re.IGNORECASE):
            kind, reason = "parameter", "a router"
        else:
            kind, reason = "parameter", f"a parameter of a {class_of(module)}, no linear layer"
        yield Part(called, kind, tuple(parameter.shape), 0, reason)
