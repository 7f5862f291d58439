"""The configuration of an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from tcurlora_ext.maths.packing import TRANSFORMS
from tcurlora_ext.maths.selection import RULES

Rank = int | tuple[int, int]
STACK_BY = ("shape", "role", "none")
TRAINABLE = ("core", "all")
CORE_DOMAINS = ("fourier", "slice")


@dataclass(frozen=True)
class TCURConfig:
    """How :func:`tcurlora_ext.inject` adapts a model.

    rank            r, or (c, r): c columns and r rows of every stack.
    target_modules  None: the attention and MLP projections of MONAI's and transformers' blocks; a list: names or ends
                    of names, whole components; a string: a regex that the whole name has to match.
    exclude_modules the same forms; what matches stays as it is.
    stack_by        "shape" (the paper): layers of one shape in one tower are a stack; "role": of one name within the
                    block; "none": every layer its own; or a function (name, module) -> key.
    split_fused     last component of a name -> how many blocks of rows of that projection are slices of their own.
    selection       rule for rows and columns, see :mod:`tcurlora_ext.maths.selection`.
    scale           None: unit-norm factors and the rule of :mod:`tcurlora_ext.maths.scale`; a number: raw factors times
                    it, 1.0 being the paper's form.
    alpha           multiplies the default rule; without effect where ``scale`` is a number.
    trainable       "core" (the paper): U; "all": U, C and R.
    transform       "dft" (the t-product), "dct", or "identity" (one independent core a layer).
    core_domain     "fourier": the trained core is the orthonormal DFT of U, so that a step needs no transform;
                    "slice": it is U itself. The same model; Adam's path differs.
    backend, seed   implementation of the operator; seed of the drawing rules.
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

    def __post_init__(self) -> None:
        pair_of(self.rank)
        if not callable(self.stack_by):
            _one_of("stack_by", self.stack_by, STACK_BY)
        _one_of("selection", self.selection, tuple(RULES))
        _one_of("trainable", self.trainable, TRAINABLE)
        _one_of("transform", self.transform, TRANSFORMS)
        _one_of("core_domain", self.core_domain, CORE_DOMAINS)
        for name in ("scale", "alpha"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} is {pattern!r}, expected a regular expression ({error})") from None
        for name, parts in self.split_fused.items():
            if not isinstance(parts, int) or parts < 1:
                raise ValueError(f"split_fused[{name!r}] is {parts!r}, expected a whole number of row blocks")

    def stack_options(self) -> dict[str, Any]:
        """What a :class:`TCURStack` takes from here by the same name."""
        names = ("alpha", "seed", "transform", "core_domain", "trainable", "backend")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values; a function given for ``stack_by`` becomes its name (files record the stacks themselves)."""
        values = asdict(self)
        values["split_fused"] = dict(self.split_fused)
        for name in ("target_modules", "exclude_modules"):
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = list(values[name])
        if callable(self.stack_by):
            values["stack_by"] = getattr(self.stack_by, "__name__", repr(self.stack_by))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TCURConfig:
        """The inverse of :meth:`to_json`; a function's name in ``stack_by`` comes back as "shape"."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"configuration has unknown entries {', '.join(unknown)}")
        values = dict(values)
        if values.get("stack_by") not in STACK_BY:
            values["stack_by"] = "shape"
        if isinstance(values.get("rank"), list):
            values["rank"] = tuple(values["rank"])
        return cls(**values)


def pair_of(rank: Rank) -> tuple[int, int]:
    """(c, r) of a rank given as r or (c, r). Raises ValueError for anything but positive whole numbers."""
    pair = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"rank is {rank!r}, expected a positive whole number r or a pair (c, r) of them")
    return pair


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
