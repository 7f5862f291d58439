"""The options of a stack as one object, shared by TCURConfig, PEFT's configuration and the stacks.

A new option takes a field of :class:`StackOptions`, a field of PEFT's configuration, and the code that uses it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from typing import Any, TypeVar

from tcurlora_ext.maths.transforms import TRANSFORMS, SliceTransform
from tcurlora_ext.operator.backends.registry import BACKENDS

T = TypeVar("T")
Rank = int | tuple[int, int]
TRAINABLE = ("core", "all")
CORE_DOMAINS = ("fourier", "slice")
WEIGHTS, LEARNED, LEARNED_ROWS = FACTORS = ("weights", "learned", "learned_rows")
GIVEN = "given"  # in place of a rule's name: the caller chose rows and columns


@dataclass(frozen=True)
class StackOptions:
    """How a :class:`tcurlora_ext.TCURStack` is built from its weights, trained and computed.

    Args:
        rank: r, or (c, r): c columns and r rows.
        selection: Rule for rows and columns, see :mod:`tcurlora_ext.maths.selection`, or ``"given"`` where the caller
            chose them.
        scale: ``None``: C and R have unit norm, and the rule of :mod:`tcurlora_ext.maths.scale` gives the scale; a
            number: C and R are raw, and this is the scale. 1.0 is the paper's form.
        trainable: ``"core"`` (the paper): U; ``"all"``: U, C and R.
        transform: A name of :data:`tcurlora_ext.maths.transforms.TRANSFORMS`.
        backend: Implementation of the operator, a name of :func:`tcurlora_ext.backends`, or ``"auto"``.
        seed: Seed of the selection rules that draw at random.
        alpha: Multiplies the default scale rule; without effect where ``scale`` is a number.
        core_domain: ``"fourier"``: the trained core is the orthonormal transform of U; ``"slice"``: it is U itself.
        dropout: Share of the adapter's input that is set to zero in training.
        rank_stabilised: Make the first optimizer step equally long at every rank; needs ``scale=None``.
        frequencies: K: the core has only the K lowest frequencies; None: all.
        factors: ``"weights"``: C and R are columns and rows of the weights; ``"learned"``: both are those of a
            :class:`tcurlora_ext.Subspace`; ``"learned_rows"``: R is, and C is columns of the weights.
        orthonormal: Make the columns and rows taken from the weights orthonormal at every frequency of the transform.
            Learned ones are in any case.

    Raises:
        ValueError: A value is unknown or out of range, or two options exclude each other: ``frequencies`` and a
            ``transform`` other than ``"dft"`` or a ``core_domain`` other than ``"fourier"``; ``rank_stabilised`` or
            ``orthonormal`` and a number for ``scale``.
    """

    rank: Rank = 8
    _: KW_ONLY
    selection: str = "norm"
    scale: float | None = None
    trainable: str = "core"
    transform: str = "dft"
    backend: str = "auto"
    seed: int = 0
    alpha: float = 1.0
    core_domain: str = "fourier"
    dropout: float = 0.0
    rank_stabilised: bool = False
    frequencies: int | None = None
    factors: str = WEIGHTS
    orthonormal: bool = False

    def __post_init__(self) -> None:
        pair_of(self.rank)
        one_of("trainable", self.trainable, TRAINABLE)
        one_of("transform", self.transform, tuple(TRANSFORMS))
        one_of("core_domain", self.core_domain, CORE_DOMAINS)
        one_of("factors", self.factors, FACTORS)
        one_of("backend", self.backend, ("auto", *BACKENDS))
        for name in ("scale", "alpha"):
            value = getattr(self, name)
            if value is None and name == "scale":
                continue
            if value is None or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if self.frequencies is not None:
            positive("frequencies", self.frequencies)
            if not self.along.truncates or self.core_domain != "fourier":
                raise ValueError(
                    f"frequencies is {self.frequencies!r}, expected transform 'dft' and core_domain 'fourier' with it, "
                    f"found transform {self.transform!r} and core_domain {self.core_domain!r}"
                )
        if self.rank_stabilised and self.scale is not None:
            raise ValueError(f"rank_stabilised changes the default scale rule, found scale {self.scale!r}, not None")
        if self.orthonormal and self.scale is not None:
            raise ValueError(f"orthonormal makes unit-norm factors, found scale {self.scale!r} of raw ones, not None")
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a number from 0 to below 1")

    @property
    def along(self) -> SliceTransform:
        """The transform along the slices."""
        return TRANSFORMS[self.transform]

    @property
    def normalised(self) -> bool:
        """Whether columns of C and rows of R get unit norm over all slices and the default rule gives the scale."""
        return self.scale is None

    def rides(self, slices: int) -> bool:
        """Whether a stack's adapter may ride on the base product: columns of W as C, own cores, and only U trains.

        Args:
            slices: S, the number of slices.
        """
        return self.factors != LEARNED and self.trainable == "core" and self.along.own_cores(slices)

    def blocks(self, slices: int) -> int:
        """The first dimension of a stack's core.

        Args:
            slices: S, the number of slices.

        Returns:
            S, or min(2K - 1, S) with ``frequencies``.
        """
        return self.along.kept_blocks(slices, self.frequencies)


# What PEFT's LoraConfig calls the options.
LORA_NAMES = {
    "r": "rank", "lora_alpha": "alpha, a factor of the default scale: 1.0 where lora_alpha = r",
    "lora_dropout": "dropout",
    "use_rslora": "rank_stabilised", "modules_to_save": "unfreeze(model, [...]) after inject",
    "init_lora_weights": "init_weights of TcurLoraConfig; a core begins at zero",
}  # fmt: skip
# An alpha of this size is taken for a lora_alpha.
LORA_SIZED = 8


def warn_of_lora_alpha(alpha: float) -> None:
    """Warn of an alpha that is as large as a lora_alpha."""
    if alpha >= LORA_SIZED:
        warnings.warn(
            f"alpha is {alpha:g}: it multiplies the default scale, whose first step is as long as LoRA's with "
            f"lora_alpha = r; the step is then {alpha:g} times as long. Usual values are 0.5 to 4",
            stacklevel=4,
        )


def explains_lora_names(config: type[T]) -> type[T]:
    """Let a configuration raise TypeError for options by LoRA's names with what they are called here."""
    init = config.__init__
    known = inspect.signature(init).parameters

    @wraps(init)
    def explaining(self: T, *values: Any, **options: Any) -> None:
        for name in options:
            if name in LORA_NAMES and name not in known:
                raise TypeError(f"{name} is an option of LoRA; here it is {LORA_NAMES[name]}")
        init(self, *values, **options)

    config.__init__ = explaining  # type: ignore[method-assign, assignment]
    return config


def pair_of(rank: Rank, name: str = "rank") -> tuple[int, int]:
    """(c, r) of a rank given as r or (c, r). Raises ValueError for anything but positive whole numbers."""
    pair = rank if isinstance(rank, tuple) else (rank, rank)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"{name} is {rank!r}, expected a positive whole number r or a pair (c, r) of them")
    return pair


def fitting_pair(rank: Rank, shape: tuple[int, int]) -> tuple[int, int]:
    """As :func:`pair_of`, for weights of shape (out, in). Raises ValueError also where c > in or r > out."""
    (c, r), (out_features, in_features) = pair_of(rank), shape
    if c > in_features or r > out_features:
        raise ValueError(
            f"rank (c, r) = ({c}, {r}) does not fit {out_features} x {in_features} weights: "
            f"expected c <= {in_features} and r <= {out_features}"
        )
    return c, r


def positive(name: str, value: object) -> None:
    """Raise ValueError unless an option's value is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive whole number")


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless an option's value is one of the known values."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
