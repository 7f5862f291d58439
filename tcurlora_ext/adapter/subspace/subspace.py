"""A subspace: for every stack of a model, the directions that learned factors span."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.options import LEARNED, WEIGHTS
from tcurlora_ext.adapter.stack.factors import LearnedFactors
from tcurlora_ext.io.described import digest
from tcurlora_ext.maths import coding
from tcurlora_ext.maths.fingerprint import fingerprint, mismatch
from tcurlora_ext.maths.learned import Directions, paired, unpaired
from tcurlora_ext.maths.orthonormal import orthonormal_blocks
from tcurlora_ext.maths.transforms import TRANSFORMS


@dataclass(frozen=True)
class StackDirections:
    """The directions of one stack, as its file has them.

    Attributes:
        names: The module of each slice, (S,).
        shape: (out, in) of a slice.
        rank: (c, r).
        left: The c left directions at each of B blocks of the slice transform, (B, out, c), coded: (bytes,) uint8.
        right: The r right directions, (B, in, r), coded.
        energy: The share of the learned change's energy within the directions before they were coded, 0 to 1.
        change: The Frobenius norm of the learned change over that of the weights.
        base_dtype: The dtype of the weights on which they were learned.
        fingerprint: The weights' fingerprint, as adapter files have it, (S, 5) float64.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    rank: tuple[int, int]
    left: Tensor
    right: Tensor
    energy: float
    change: float
    base_dtype: str
    fingerprint: Tensor


@dataclass(frozen=True)
class Subspace:
    """Learned factors of a model: what :func:`tcurlora_ext.learn_factors` returns, and many adapters share.

    An adapter over a subspace trains cores alone. The directions are stored in few bits; :meth:`factors` decodes and
    orthonormalises them, to the same bits on every machine and with every number of threads.

    Args:
        config: The configuration of the adapters for which it was learned.
        bits: Bits of an entry, one of 1 (signs), 2, 4, 8, 16 and 32 (float32, not coded).
        stacks: The directions of every stack, by its name.
        about: How it was learned, for people: values that JSON can hold.
    """

    config: TCURConfig
    bits: int
    stacks: Mapping[str, StackDirections]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many parameters the cores of an adapter over all of it have."""
        blocks = (self.config.blocks(len(stack.names)) for stack in self.stacks.values())
        return sum(b * stack.rank[0] * stack.rank[1] for b, stack in zip(blocks, self.stacks.values(), strict=True))

    @property
    def nbytes(self) -> int:
        """The bytes of the coded directions."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __str__(self) -> str:
        kind = "both factors" if self.config.factors == LEARNED else "R"
        return (
            f"learned {kind}: subspace {self.digest[:12]}, in {self.bits} bits, {len(self.stacks)} stacks, "
            f"{self.nbytes / 1024:,.1f} KiB"
        )

    @property
    def digest(self) -> str:
        """The name by which adapters refer to it, which is the SHA-256 of its file's content as hexadecimal digits."""
        known: str | None = self.__dict__.get("_digest")  # taken once: a subspace does not change
        if known is None:
            known = self.__dict__["_digest"] = digest(self.header(), self.tensors())
        return known

    def header(self) -> dict[str, Any]:
        """The description in its file, without the digest: values that JSON can hold."""
        described = {
            name: {
                "names": list(stack.names), "shape": list(stack.shape), "rank": list(stack.rank),
                "energy": stack.energy, "change": stack.change, "base_dtype": stack.base_dtype,
                "fingerprint": stack.fingerprint.tolist(),
            }
            for name, stack in self.stacks.items()
        }  # fmt: skip
        return {
            "format": 1, "config": self.config.to_json(), "bits": self.bits, "stacks": described,
            "about": dict(self.about),
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in its file: ``left.<stack>`` and ``right.<stack>``."""
        sides = ((name, side) for name in self.stacks for side in ("left", "right"))
        return {f"{side}.{name}": getattr(self.stacks[name], side) for name, side in sides}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, which replaces one at ``path`` only when it is complete.

        Args:
            path: The file. Missing parent folders are created.

        Returns:
            The path of the file.

        Raises:
            OSError: The file cannot be written.
        """
        from .files import write_subspace

        return write_subspace(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subspace:
        """Read a subspace: from a file of its own, or from that of an adapter that holds it.

        Args:
            path: A file by :meth:`save`, or by :func:`tcurlora_ext.save_adapter` over learned factors.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or has no subspace.
        """
        from .files import read_subspace

        return read_subspace(Path(path))

    def named(self, names: Sequence[str]) -> tuple[str, StackDirections] | None:
        """The stack with exactly these slices, in this order, and its name here; None where there is none.

        Args:
            names: The module of each slice.
        """
        return next(((own, stack) for own, stack in self.stacks.items() if stack.names == tuple(names)), None)

    def factors(
        self, names: Sequence[str], rank: tuple[int, int], weights: Tensor, config: TCURConfig, exact: bool = True
    ) -> LearnedFactors:
        """The factors of one stack.

        Args:
            names: The module of each slice.
            rank: (c, r), at most those that were learned: the leading directions are taken.
            weights: The base weights of the stack (S, out, in).
            config: The configuration of the adapter.
            exact: Whether the weights have to be those on which the subspace was learned; a quantised copy of them is
                not.

        Returns:
            C (S, out, c) and R (S, r, in), float64 on the device of the weights.

        Raises:
            ValueError: The subspace is for other layers, another shape, transform or base, or has a lower rank.
        """
        require_usable(self, config)
        found = self.named(names)
        if found is None:
            raise ValueError(
                f"the subspace has no directions for {', '.join(names[:3])} ({len(names)} slices); its "
                f"{len(self.stacks)} stacks are those of {self._outline()}"
            )
        own, stack = found
        if tuple(weights.shape[1:]) != stack.shape:
            raise ValueError(f"the subspace is for {stack.shape} weights, found {tuple(weights.shape[1:])}")
        if rank[0] > stack.rank[0] or rank[1] > stack.rank[1]:
            raise ValueError(f"rank (c, r) is {rank}, expected at most the {stack.rank} of the subspace")
        if exact:
            other = mismatch(stack.fingerprint, fingerprint(weights), stack.base_dtype, weights.dtype)
            if other:
                raise ValueError(
                    f"the subspace was learned on other base weights: {len(other)} of {len(names)} slices differ, "
                    f"first {names[other[0]]}"
                )
        left, right = self._directions(own)
        along, slices = TRANSFORMS[self.config.transform], len(names)
        C = along.unfold(_orthonormal(left[..., : rank[0]], own, along, slices), slices)
        R = along.unfold(_orthonormal(right[..., : rank[1]], own, along, slices), slices).mT
        return LearnedFactors(C.to(weights.device), R.contiguous().to(weights.device))

    def _directions(self, name: str) -> tuple[Tensor, Tensor]:
        """The decoded directions of a stack, not orthonormal: (B, out, c) and (B, in, r) float64 on the CPU."""
        stack = self.stacks[name]
        blocks = self.config.blocks(len(stack.names))
        out_features, in_features = stack.shape
        c, r = stack.rank
        left = coding.decode(stack.left, self.bits, (blocks, out_features, c))
        right = coding.decode(stack.right, self.bits, (blocks, in_features, r))
        return left, right

    def _outline(self) -> str:
        first = [stack.names[0] for stack in self.stacks.values()]
        return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def opened(subspace: Subspace | str | os.PathLike[str] | None) -> Subspace | None:
    """A subspace, given as such, by the path of its file, or not at all. Raises as :meth:`Subspace.load`."""
    return Subspace.load(subspace) if isinstance(subspace, (str, os.PathLike)) else subspace


def require_whole(subspace: Subspace) -> None:
    """Raise ValueError where the coded directions of a stack are not of the size that its description says."""
    name = ""
    try:
        for name in subspace.stacks:
            subspace._directions(name)
    except ValueError as error:
        raise ValueError(f"directions of stack {name}: {error}") from None


def require_usable(subspace: Subspace, config: TCURConfig) -> None:
    """Raise ValueError where a configuration is not for learned factors, or not for those of a subspace."""
    if config.factors == WEIGHTS:
        raise ValueError(
            "a subspace is given and factors is 'weights', expected 'learned' or 'learned_rows'; the subspace's own "
            "config has it"
        )
    for option in ("transform", "frequencies"):
        found, expected = getattr(config, option), getattr(subspace.config, option)
        if found != expected:
            raise ValueError(f"{option} is {found!r}, expected {expected!r} as the subspace was learned")


def directions_of(
    names: Sequence[str], weights: Tensor, found: Directions, config: TCURConfig, bits: int
) -> StackDirections:
    """Code the directions of one stack.

    Args:
        names: The module of each slice.
        weights: The base weights (S, out, in) on which they were learned.
        found: The directions.
        config: The configuration.
        bits: Bits of an entry.

    Raises:
        ValueError: In so few bits, directions depend on each other.
    """
    along, slices = config.along, len(names)
    coded = []
    for side in (found.left, found.right):
        # The two blocks of a frequency are coded together: they are the parts of one complex vector.
        parts = [coding.rounded(part, bits) for part in paired(side.cpu(), along, slices)]
        levels = unpaired(parts, along, len(side), slices)
        _orthonormal(levels.double(), ", ".join(names[:3]), along, slices)
        coded.append(coding.pack(levels, bits))
    left, right = coded
    return StackDirections(
        names=tuple(names),
        shape=(weights.shape[1], weights.shape[2]),
        rank=(found.left.shape[2], found.right.shape[2]),
        left=left,
        right=right,
        energy=found.energy,
        change=found.norm / float(weights.double().norm()),
        base_dtype=str(weights.dtype).removeprefix("torch."),
        fingerprint=fingerprint(weights),
    )


def _orthonormal(blocks: Tensor, name: str, along: Any, slices: int) -> Tensor:
    try:
        return orthonormal_blocks(blocks, along, slices)[0]
    except ValueError as error:
        raise ValueError(
            f"directions of {name}: {error}; learn them at a lower rank, or code them in more bits"
        ) from None
