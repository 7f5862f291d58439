"""What a stack is made with, as one object: the options that TCURConfig, PEFT's configuration and the stacks share.

A new option is one field of :class:`StackOptions`, one of PEFT's configuration, and the place that uses it.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from tcurlora_ext.maths.transforms import TRANSFORMS, SliceTransform

Rank = int | tuple[int, int]
TRAINABLE = ("core", "all")
CORE_DOMAINS = ("fourier", "slice")
GIVEN = "given"  # the rule of a selection that the caller made


@dataclass(frozen=True)
class StackOptions:
    """How a :class:`tcurlora_ext.TCURStack` is made of its weights, trained and computed.

    Args:
        rank: r, or (c, r): c columns and r rows.
        selection: Rule for rows and columns, see :mod:`tcurlora_ext.maths.selection`, or ``"given"`` where the caller
            chose them.
        scale: ``None``: unit-norm factors and the rule of :mod:`tcurlora_ext.maths.scale`; a number: raw factors times
            it, 1.0 being the paper's form.
        trainable: ``"core"`` (the paper): U; ``"all"``: U, C and R.
        transform: A name of :data:`tcurlora_ext.maths.transforms.TRANSFORMS`.
        backend: Implementation of the operator, a name of :func:`tcurlora_ext.backends`, or ``"auto"``.
        seed: For the selection rules that draw at random.
        alpha: Multiplies the default scale rule; without effect where ``scale`` is a number.
        core_domain: Where the trained core lives: ``"fourier"`` or ``"slice"``.
        dropout: Share of the adapter's input that is set to zero in training.
        rank_stabilised: Make the first optimizer step equally long at every rank; for ``scale=None``.
        frequencies: K: the core has the K lowest frequencies alone; None: all.

    Raises:
        ValueError: A value is unknown or out of range, or two options exclude each other: ``frequencies`` and another
            ``transform`` than ``"dft"`` or ``core_domain`` than ``"fourier"``; ``rank_stabilised`` and a number for
            ``scale``.
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

    def __post_init__(self) -> None:
        pair_of(self.rank)
        one_of("trainable", self.trainable, TRAINABLE)
        one_of("transform", self.transform, tuple(TRANSFORMS))
        one_of("core_domain", self.core_domain, CORE_DOMAINS)
        for name in ("scale", "alpha"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if self.frequencies is not None:
            positive("frequencies", self.frequencies)
            if not self.along.truncates or self.core_domain != "fourier":
                raise ValueError(
                    f"frequencies are those of a core in the Fourier domain of the DFT, found transform "
                    f"{self.transform!r} and core_domain {self.core_domain!r}"
                )
        if self.rank_stabilised and self.scale is not None:
            raise ValueError(f"rank_stabilised is a form of the default rule, found scale {self.scale!r}")
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a number from 0 to below 1")

    @property
    def along(self) -> SliceTransform:
        """The transform along the slices."""
        return TRANSFORMS[self.transform]

    @property
    def normalised(self) -> bool:
        """Whether columns of C and rows of R get unit norm over the stack, and the default rule makes the scale."""
        return self.scale is None

    def blocks(self, slices: int) -> int:
        """The first dimension of the core of a stack.

        Args:
            slices: S, how many slices it has.

        Returns:
            S, or with ``frequencies`` min(2K - 1, S).
        """
        return self.along.kept_blocks(slices, self.frequencies)


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


def positive(name: str, value: object) -> None:
    """Raise ValueError unless an option's value is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive whole number")


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless an option's value is one of those known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
