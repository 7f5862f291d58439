"""What learned factors cost: the bytes of their files, and the memory of the warm-up that learns them.

A warm-up of :func:`tcurlora_ext.learn_factors` trains the whole weights of the targets: beside the model and its
activations it holds their gradients, Adam's two moments of them, and copies, with which they are put back and compared.
Weights of less than 32 bits train as float32 copies, and have gradients of both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.targets import Target
from tcurlora_ext.io.table import text_table

from .filesize import Ranks, file_bytes, subspace_bytes


@dataclass(frozen=True)
class WarmupMemory:
    """What a warm-up holds beside the model and its activations, in bytes.

    Attributes:
        gradients: Of the trained weights.
        moments: The optimizer's.
        copies: Of the weights, and the changes of all layers.
    """

    gradients: int
    moments: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.moments + self.copies


@dataclass(frozen=True)
class LearnedPlan:
    """The files and the warm-up of learned factors. ``str()`` formats them as a table.

    Attributes:
        bits: Bits of an entry of the directions.
        subspace_file: Bytes of the subspace's own file.
        adapter_file: Bytes of an adapter file that holds the subspace.
        cores_file: Bytes of an adapter file that names the subspace by its digest.
        warmups: Kind of warm-up -> its memory.
    """

    bits: int
    subspace_file: int
    adapter_file: int
    cores_file: int
    warmups: Mapping[str, WarmupMemory]

    def to_json(self) -> dict[str, Any]:
        """The plan as numbers, strings and dicts."""
        found = {name: getattr(self, name) for name in ("bits", "subspace_file", "adapter_file", "cores_file")}
        return found | {"warmups": {kind: asdict(warmup) for kind, warmup in self.warmups.items()}}

    def __str__(self) -> str:
        rows = [
            [kind, *(f"{size / 2**20:,.2f}" for size in (w.gradients, w.moments, w.copies, w.total))]
            for kind, w in self.warmups.items()
        ]
        files = (self.subspace_file, self.adapter_file, self.cores_file)
        subspace, adapter, cores = (f"{size / 1024:,.1f} KiB" for size in files)
        return (
            f"subspace in {self.bits} bits: a file of {subspace}; an adapter's file: {adapter} with it, {cores} without"
            "\n\n" + text_table(["warm-up, MiB", "gradients", "moments", "copies", "in all"], rows)
        )


def plan_learned(
    config: TCURConfig, groups: Mapping[str, Sequence[Target]], ranks: Ranks, bits: int, parts: int
) -> LearnedPlan:
    """The plan of learned factors.

    Args:
        config: The adapter's configuration.
        groups: The targets of every stack.
        ranks: The rank of every stack.
        bits: Bits of an entry of the directions.
        parts: In how many parts a warm-up may be.
    """
    targets = [target for members in groups.values() for target in members]
    warmups = {"Adam, all layers at once": warmup_memory(targets)}
    if parts > 1:
        warmups[f"Adam, in {parts} parts"] = warmup_memory(targets, parts)
    warmups["factored moments, all at once"] = warmup_memory(targets, factored=True)
    if parts > 1:
        warmups[f"factored moments, in {parts} parts"] = warmup_memory(targets, parts, factored=True)
    return LearnedPlan(
        bits,
        subspace_bytes(config, groups, ranks, bits),
        file_bytes(config, groups, ranks, bits),
        file_bytes(config, groups, ranks, None),
        warmups,
    )


def warmup_memory(targets: Sequence[Target], parts: int = 1, factored: bool = False) -> WarmupMemory:
    """The memory of a warm-up, in its largest part.

    Args:
        targets: The layers whose weights train.
        parts: As of :func:`tcurlora_ext.learn_factors`.
        factored: Whether the optimizer has one mean for each row and each column of a weight (Adafactor), in place of
            two for each entry (Adam).
    """
    size = -(-len(targets) // parts)
    changes = sum(_entries(target) * _wide(target) for target in targets)
    found = []
    for first in range(0, len(targets), size):
        gradients = moments = copies = 0
        for target in targets[first : first + size]:
            entries, own, wide = _entries(target), target.weight.element_size(), _wide(target)
            short = own < wide
            gradients += entries * (own + (wide if short else 0))
            moments += wide * (_sides(target) if factored else 2 * entries)
            copies += entries * (own + wide + (wide if short else 0))
        found.append(WarmupMemory(gradients, moments, copies + changes))
    return max(found, key=lambda one: one.total)


def _entries(target: Target) -> int:
    out_features, in_features = target.shape
    return target.slices * out_features * in_features


def _sides(target: Target) -> int:
    out_features, in_features = target.shape
    return target.slices * out_features + in_features


def _wide(target: Target) -> int:
    return max(4, target.weight.element_size())
