"""The configuration of an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from tcurlora_ext.maths.packing import TRANSFORMS, kept_blocks
from tcurlora_ext.maths.selection import RULES

Rank = int | tuple[int, int]
STACK_BY = ("shape", "role", "none")
TRAINABLE = ("core", "all")
CORE_DOMAINS = ("fourier", "slice")


@dataclass(frozen=True)
class TCURConfig:
    """How :func:`inject` adapts a model.

    Args:
        rank: r, or (c, r): c columns and r rows of every stack.
        target_modules: ``None``: the attention and MLP projections of MONAI's and transformers' blocks; a list: names
            or ends of names, whole components; a string: a regex that the whole name has to match.
        exclude_modules: The same forms; what matches stays as it is.
        stack_by: ``"shape"`` (the paper): layers of one shape in one tower are a stack, the tower being the path before
            the first number in a name; ``"role"``: of one shape and one name within the block; ``"none"``: every layer
            its own; or a function (name, module) -> key.
        split_fused: Last component of a name -> how many blocks of rows of that projection are slices of their own. By
            default ``{"qkv": 3, "c_attn": 3}``.
        selection: Rule for rows and columns, see :mod:`tcurlora_ext.maths.selection`; ``"activation"`` takes what
            :func:`calibrate` returns.
        scale: ``None``: unit-norm factors and the rule of :mod:`tcurlora_ext.maths.scale`; a number: raw factors times
            it, 1.0 being the paper's form.
        trainable: ``"core"`` (the paper): U; ``"all"``: U, C and R.
        transform: ``"dft"`` (the t-product), ``"dct"``, or ``"identity"`` (one independent core a layer).
        backend: Implementation of the operator, a name of :func:`backends`, or ``"auto"``.
        seed: Of the selection rules that draw.
        alpha: Multiplies the default rule; without effect where ``scale`` is a number.
        core_domain: ``"fourier"``: the trained core is the orthonormal DFT of U, so that a step needs no transform;
            ``"slice"``: it is U itself. The same model; Adam's path differs.
        rank_pattern: Regex for the whole name of a module, or end of a name -> rank of its stack in place of ``rank``;
            the first that matches counts. By default empty.
        budget: How many numbers all cores may have together, spread over the stacks in place of ``rank`` by
            :func:`tcurlora_ext.maths.budget.spread_budget`; c = r.
        stack_blocks: n: stacks by shape or role are cut into stacks of n consecutive blocks, fewer in the last where n
            does not divide; a block is the modules whose names agree up to their last number.
        dropout: Share of the adapter's input that is set to zero in training, as LoRA's; the base sees all of it.
        rank_stabilised: The default rule for a gradient's signs, not for random ones: a first step as long at any rank.
        frequencies: K: the core has the K lowest frequencies of the DFT alone, min(2K - 1, S) blocks in place of S.

    Raises:
        ValueError: A value is unknown or out of range, a regex does not compile, or options exclude each other:
            ``budget`` and ``rank_pattern``; ``stack_blocks`` and stacks by neither shape nor role; ``frequencies`` and
            another ``transform`` than ``"dft"`` or ``core_domain`` than ``"fourier"``; ``rank_stabilised`` and a number
            for ``scale``.
    """

    rank: Rank = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    stack_by: str | Callable[[str, nn.Module], object] = "shape"
    split_fused: Mapping[str, int] = field(default_factory=lambda: {"qkv": 3, "c_attn": 3})
    selection: str = "norm"
    scale: float | None = None
    trainable: str = "core"
    transform: str = "dft"
    backend: str = "auto"
    seed: int = 0
    alpha: float = 1.0
    core_domain: str = "fourier"
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    budget: int | None = None
    stack_blocks: int | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False
    frequencies: int | None = None

    def __post_init__(self) -> None:
        pair_of(self.rank)
        if not callable(self.stack_by):
            one_of("stack_by", self.stack_by, STACK_BY)
        if self.budget is not None:
            _positive("budget", self.budget)
            if self.rank_pattern:
                raise ValueError(f"budget is {self.budget} and rank_pattern {dict(self.rank_pattern)}: expected one")
        if self.stack_blocks is not None:
            if self.stack_by not in ("shape", "role"):
                raise ValueError(f"stack_blocks cuts stacks by 'shape' or 'role', found stack_by {self.stack_by!r}")
            _positive("stack_blocks", self.stack_blocks)
        one_of("selection", self.selection, tuple(RULES))
        one_of("trainable", self.trainable, TRAINABLE)
        one_of("transform", self.transform, TRANSFORMS)
        one_of("core_domain", self.core_domain, CORE_DOMAINS)
        for name in ("scale", "alpha"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if self.frequencies is not None:
            _positive("frequencies", self.frequencies)
            if (self.transform, self.core_domain) != ("dft", "fourier"):
                raise ValueError(
                    f"frequencies are those of a core in the Fourier domain of the DFT, found transform "
                    f"{self.transform!r} and core_domain {self.core_domain!r}"
                )
        if self.rank_stabilised and self.scale is not None:
            raise ValueError(f"rank_stabilised is a form of the default rule, found scale {self.scale!r}")
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a number from 0 to below 1")
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str):
                _check_regex(name, pattern)
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern)
            pair_of(rank, f"rank_pattern[{pattern!r}]")
        for name, parts in self.split_fused.items():
            if not isinstance(parts, int) or parts < 1:
                raise ValueError(f"split_fused[{name!r}] is {parts!r}, expected a whole number of row blocks")

    def blocks(self, slices: int) -> int:
        """The first dimension of the core of a stack.

        Args:
            slices: S, how many slices it has.

        Returns:
            S, or with ``frequencies`` min(2K - 1, S).
        """
        return kept_blocks(slices, self.frequencies)

    def stack_options(self) -> dict[str, Any]:
        """The options that a :class:`TCURStack` takes from here by the same name."""
        of_the_core = ("transform", "core_domain", "trainable", "frequencies")
        names = ("alpha", "rank_stabilised", "dropout", "seed", "backend", *of_the_core)
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The options as plain values: numbers, strings, lists and dicts.

        A function given for ``stack_by`` becomes its name; an adapter file records the stacks themselves.
        """
        values = asdict(self)
        for name in ("split_fused", "rank_pattern"):
            values[name] = dict(getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = list(values[name])
        if callable(self.stack_by):
            values["stack_by"] = getattr(self.stack_by, "__name__", repr(self.stack_by))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TCURConfig:
        """The inverse of :meth:`to_json`.

        Args:
            values: Options by name; those left out have their defaults. A function's name in ``stack_by`` comes back as
                ``"shape"``.

        Raises:
            ValueError: An entry is no option, or has a value that :class:`TCURConfig` refuses.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"configuration has unknown entries {', '.join(unknown)}")
        values = dict(values)
        if values.get("stack_by") not in STACK_BY:
            values["stack_by"] = "shape"
        if "rank" in values:
            values["rank"] = _from_list(values["rank"])
        if "rank_pattern" in values:
            values["rank_pattern"] = {name: _from_list(rank) for name, rank in values["rank_pattern"].items()}
        return cls(**values)


def pair_of(rank: Rank, name: str = "rank") -> tuple[int, int]:
    """(c, r) of a rank given as r or (c, r). Raises ValueError for anything but positive whole numbers."""
    pair = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"{name} is {rank!r}, expected a positive whole number r or a pair (c, r) of them")
    return pair


def fitting_pair(rank: Rank, shape: tuple[int, int]) -> tuple[int, int]:
    """As :func:`pair_of`, for weights of shape (out, in). Raises ValueError where the rank is larger than these."""
    (c, r), (out_features, in_features) = pair_of(rank), shape
    if c > in_features or r > out_features:
        raise ValueError(
            f"rank (c, r) = ({c}, {r}) does not fit {out_features} x {in_features} weights: "
            f"expected c <= {in_features} and r <= {out_features}"
        )
    return c, r


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive whole number")


def _from_list(rank: Any) -> Any:
    """JSON has no tuples."""
    return tuple(rank) if isinstance(rank, list) else rank


def _check_regex(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option} is {pattern!r}, expected a regular expression ({error})") from None


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless an option's value is one of those known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
