"""Which backend ``"auto"`` chooses: a small table by device, dtype and sizes, and which backends work on a device.

csrc/choice.cpp asks for the rules of a device once and then matches every call against them itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from .registry import BACKENDS, missing

VARIABLE = "TCURLORA_BACKEND"
UNLIMITED = 2**62
Range = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call that rules may depend on."""

    tokens: int  # rows of x
    width: int  # q: the larger of r*S and c*S
    weight: int  # entries of the layer's weight, n*out*in


@dataclass(frozen=True)
class Rule:
    """Take ``backend`` for calls of these dtypes (None: all) and sizes, both ends included; ``reason`` says why."""

    backend: str
    reason: str
    dtypes: tuple[torch.dtype, ...] | None = None
    tokens: Range = (0, UNLIMITED)
    width: Range = (0, UNLIMITED)
    weight: Range = (0, UNLIMITED)

    @property
    def limited(self) -> bool:
        """Whether the rule matches only some calls."""
        return self.dtypes is not None or any(r != (0, UNLIMITED) for r in (self.tokens, self.width, self.weight))

    def matches(self, dtype: torch.dtype, sizes: Sizes) -> bool:
        """Whether the rule matches a call of this dtype and these sizes."""
        return (self.dtypes is None or dtype in self.dtypes) and all(
            low <= value <= high
            for value, (low, high) in (
                (sizes.tokens, self.tokens), (sizes.width, self.width), (sizes.weight, self.weight)
            )
        )  # fmt: skip

    def __str__(self) -> str:
        limits = [", ".join(str(d).removeprefix("torch.") for d in self.dtypes)] if self.dtypes else []
        for name in ("tokens", "width", "weight"):
            low, high = getattr(self, name)
            if (low, high) != (0, UNLIMITED):
                limits.append(f"{name} {low} to {high}" if high != UNLIMITED else f"{name} from {low}")
        return f"{self.backend} for {'; '.join(limits) or 'everything'} ({self.reason})"


# The first rule that matches decides; rules whose backend does not work on the device are skipped. A key is "cpu", the
# name of a GPU, or "cuda" for all GPUs without an entry of their own.
TABLE: dict[str, tuple[Rule, ...]] = {
    "cpu": (
        Rule(
            "native", "0.89 to 1.02 of eager's time for UNETR's layers, 0.11 for tiny ones: bench/results/intel-xeon-*"
        ),
    ),
    "cuda": (Rule("eager", "no kernel has been measured on this GPU yet"),),
}
EAGER = Rule("eager", "nothing else has kernels for this device")


@dataclass(frozen=True)
class Choices:
    """The rules for one device, the last of which matches every call, and per backend why it does not work, or ""."""

    rules: tuple[Rule, ...]
    missing: dict[str, str]


def override() -> str:
    """The backend that TCURLORA_BACKEND names; "auto" where it is not set. Raises ValueError for an unknown one."""
    name = os.environ.get(VARIABLE) or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {name!r}, expected 'auto' or one of {', '.join(BACKENDS)}")
    return name


@lru_cache(maxsize=64)
def choices(device: torch.device) -> Choices:
    """The rules and missing backends of a device."""
    reasons = {name: missing(name, device.type) for name in BACKENDS}
    if override() != "auto":
        return Choices((Rule(override(), f"{VARIABLE} is set"),), reasons)
    table = TABLE.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    works = [rule for rule in (*(table or TABLE.get(device.type, ())), EAGER) if not reasons[rule.backend]]
    last = next(at for at, rule in enumerate(works) if not rule.limited)
    return Choices(tuple(works[: last + 1]), reasons)


def choose(backend: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Rule:
    """The rule that decides a call.

    Raises ValueError for an unknown backend, RuntimeError for one that does not work on the device.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown, expected 'auto' or one of {', '.join(BACKENDS)}")
    found = choices(device)
    rule = next(rule for rule in found.rules if rule.matches(dtype, sizes))
    if backend != "auto":
        rule = Rule(backend, "asked for")
    if found.missing[rule.backend]:
        raise RuntimeError(
            f"backend {rule.backend!r} does not work on {device}: {found.missing[rule.backend]}; use 'auto' or 'eager'"
        )
    return rule


def as_plain_values(device: str) -> tuple[list[tuple[int, list[str], list[int], list[int]]], list[str]]:
    """The result of :func:`choices` as lists, strings and integers, for the C++ extension."""
    found = choices(torch.device(device))
    rules = []
    for rule in found.rules:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in rule.dtypes or ()]
        low, high = zip(rule.tokens, rule.width, rule.weight, strict=True)
        rules.append((list(BACKENDS).index(rule.backend), dtypes, list(low), list(high)))
    return rules, [found.missing[name] for name in BACKENDS]
