"""The configuration of an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import Any

from torch import nn

from tcurlora_ext.maths.selection import RULES

from .options import WEIGHTS, Rank, StackOptions, explains_lora_names, one_of, pair_of, positive, warn_of_lora_alpha

# The equal row blocks of fused projections by name: MONAI, timm, GPT-2, ModernBERT, MPT, Phi-3.
DEFAULT_SPLIT = {"qkv": 3, "c_attn": 3, "Wqkv": 3, "qkv_proj": 3, "kv": 2, "gate_up_proj": 2, "Wi": 2}
STACK_BY = ("shape", "role", "none")
# Options that the first files of format 1 do not have, and what they stand for.
LATER = {"factors": WEIGHTS, "orthonormal": False}
# A fused projection as one slice needs one changed input and one base product; its parts as slices one of each a part.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "light": {"stack_by": "none", "transform": "identity", "split_fused": {}, "rank": 32},
    "learned": {"stack_by": "none", "transform": "identity", "factors": "learned"},
}


@explains_lora_names
@dataclass(frozen=True)
class TCURConfig(StackOptions):
    """How :func:`inject` adapts a model.

    Args:
        rank: r, or (c, r): c columns and r rows of every stack.
        target_modules: ``None``: the linear layers in blocks that the model repeats, without heads, embeddings and
            routers, or where there are none the convolutions, without stems and heads; a list: names of modules, or
            ends of names in whole components; a string: a regex that has to match the whole name. The parameters of
            ``nn.MultiheadAttention`` and of experts count as modules.
        exclude_modules: Modules to leave out, in the same forms.
        stack_by: Which layers form a stack. ``"shape"`` (the paper): layers of one shape in one tower, the tower being
            the path before the first number in a name; ``"role"``: layers of one shape in one tower with the same name
            within their blocks; ``"none"``: every layer alone; or a function (name, module) -> key of the stack.
        split_fused: Last component of a name -> number of equal blocks of rows into which such a projection is split;
            every block is a slice. By default the fused projections that are known by name, where their parts have one
            shape; those of unequal parts are one slice.
        selection: Rule for rows and columns, see :mod:`tcurlora_ext.maths.selection`; ``"activation"`` needs the
            result of :func:`calibrate`.
        scale: ``None``: C and R have unit norm, and the rule of :mod:`tcurlora_ext.maths.scale` gives the scale; a
            number: C and R are raw, and this is the scale. 1.0 is the paper's form.
        trainable: ``"core"`` (the paper): U; ``"all"``: U, C and R.
        transform: ``"dft"`` (the t-product), ``"dct"``, or ``"identity"`` (one independent core per layer).
        backend: Implementation of the operator, a name of :func:`backends`, or ``"auto"``.
        seed: Seed of the selection rules that draw at random.
        alpha: Multiplies the default scale rule; without effect where ``scale`` is a number.
        core_domain: ``"fourier"``: the trained core is the orthonormal DFT of U, so that a step needs no transform;
            ``"slice"``: it is U itself. Both describe the same models, but Adam takes different steps.
        rank_pattern: Rank of particular stacks in place of ``rank``: a regex for the whole name of a module, or an end
            of its name -> rank of its stack. The first pattern that matches is used. By default empty.
        budget: Parameter budget of all cores together, spread over the stacks in place of ``rank`` by
            :func:`tcurlora_ext.maths.budget.spread_budget`; c = r.
        stack_blocks: n: stacks by shape or role are cut into stacks of n consecutive blocks, fewer in the last where n
            does not divide; a block is the modules whose names agree up to their last number.
        dropout: Share of the adapter's input that is set to zero in training, as in LoRA; the base gets all of it.
        rank_stabilised: Make the first optimizer step equally long at every rank: the default scale rule then divides
            by the length of a step along a gradient's signs, not along random signs.
        frequencies: K: the core has only the K lowest frequencies of the DFT, min(2K - 1, S) blocks in place of S.
        factors: ``"weights"`` (the paper): C and R are columns and rows of the weights; ``"learned"``: both are
            directions learned by :func:`learn_factors`; ``"learned_rows"``: R is learned, and C is columns of the
            weights, so that the adapter can ride on the base product.
        orthonormal: Make columns and rows taken from the weights orthonormal at every frequency of the transform, which
            changes no span. Learned ones are in any case.

    Raises:
        TypeError: An option has an unknown name; for LoRA's names (``lora_alpha``) the message says what it is here.
        ValueError: A value is unknown or out of range, a regex does not compile, or options exclude each other:
            ``budget`` and ``rank_pattern``; ``stack_blocks`` and a ``stack_by`` other than ``"shape"`` or ``"role"``;
            ``frequencies`` and a ``transform`` other than ``"dft"`` or a ``core_domain`` other than ``"fourier"``;
            ``rank_stabilised`` or ``orthonormal`` and a number for ``scale``.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    stack_by: str | Callable[[str, nn.Module], object] = "shape"
    split_fused: Mapping[str, int] = field(default_factory=DEFAULT_SPLIT.copy)
    _: KW_ONLY
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    budget: int | None = None
    stack_blocks: int | None = None

    def __post_init__(self) -> None:
        one_of("selection", self.selection, tuple(RULES))
        super().__post_init__()
        if self.scale is None:
            warn_of_lora_alpha(self.alpha)
        if not callable(self.stack_by):
            one_of("stack_by", self.stack_by, STACK_BY)
        if self.budget is not None:
            positive("budget", self.budget)
            if self.rank_pattern:
                raise ValueError(
                    f"budget is {self.budget} and rank_pattern {dict(self.rank_pattern)}: expected one of the two"
                )
        if self.stack_blocks is not None:
            if self.stack_by not in ("shape", "role"):
                raise ValueError(f"stack_blocks cuts stacks by 'shape' or 'role', found stack_by {self.stack_by!r}")
            positive("stack_blocks", self.stack_blocks)
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

    @classmethod
    def preset(cls, name: str, **options: Any) -> TCURConfig:
        """A configuration by one word; docs/choosing.md compares them.

        Args:
            name: ``"paper"``: stacks of one shape, coupled by the DFT, at rank 8, as ``TCURConfig()``; ``"light"``:
                every layer has a core of its own, a fused projection too, at rank 32. Its adapter rides on the base
                product and costs next to no time; ``"learned"``: every layer, and each part of a fused projection, has
                a core of its own over learned factors, at rank 8.
            **options: Options that differ from the preset's.

        Raises:
            ValueError: The name is unknown, or the configuration refuses an option.
        """
        one_of("preset", name, tuple(PRESETS))
        return cls(**(PRESETS[name] | options))

    def stack_options(self, rank: Rank | None = None) -> StackOptions:
        """The options with which a stack of this adapter is built.

        Args:
            rank: The stack's rank; None: that of this configuration.
        """
        options = {option.name: getattr(self, option.name) for option in fields(StackOptions)}
        return StackOptions(**(options | {"rank": rank or self.rank}))

    def to_json(self, every: bool = True) -> dict[str, Any]:
        """The options as values that JSON can hold: numbers, strings, lists and dicts.

        A function for ``stack_by`` is replaced by its name: an adapter file also records the stacks themselves.

        Args:
            every: Whether options that came after the first file format are among them also where they have their
                default; earlier versions refuse files that have them.
        """
        values = asdict(self)
        for name in ("split_fused", "rank_pattern"):
            values[name] = dict(getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = list(values[name])
        if callable(self.stack_by):
            values["stack_by"] = getattr(self.stack_by, "__name__", repr(self.stack_by))
        return {name: value for name, value in values.items() if every or name not in LATER or value != LATER[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TCURConfig:
        """The inverse of :meth:`to_json`.

        Args:
            values: Options by name; those left out get their defaults. A function's name in ``stack_by`` is read as
                ``"shape"``.

        Raises:
            ValueError: A key is not the name of an option, or :class:`TCURConfig` refuses a value.
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


def _from_list(rank: Any) -> Any:
    """A rank as read from JSON, which has lists in place of tuples."""
    return tuple(rank) if isinstance(rank, list) else rank


def _check_regex(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option} is {pattern!r}, expected a regular expression ({error})") from None
