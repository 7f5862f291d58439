"""What each stage of the operator costs by count: FLOPs of its matrix products, and the fewest bytes that it moves.

A stage is one of the named ranges of tcurlora_ext.trace. Its name says what it computes, and the counts are derived
from the name: those of a merged stage ("h = x row^T, m = h B^T") are the sum of its parts', without the tensors that
only pass from one part to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.maths.flops import CallFlops

from ..variants import Problem


@dataclass(frozen=True)
class _Part:
    """One line of the maths.

    Attributes:
        reads: The tensors that it reads.
        writes: The tensor that it writes.
        products: Its matrix products, by the names of the methods of :class:`CallFlops` that count them.
    """

    reads: tuple[str, ...]
    writes: str
    products: tuple[str, ...]


def _part(reads: str, writes: str, *products: str) -> _Part:
    return _Part(tuple(reads.split()), writes, tuple(f"{product}_product" for product in products))


PARTS = {
    "h = x row^T": _part("x row", "h", "row"),
    "m = h B^T": _part("h core", "m", "middle"),
    "y = x W^T + bias": _part("x weight bias", "y", "base"),
    "y += m col^T": _part("y m col", "y", "column"),
    "y = bias + m col^T": _part("bias m col", "y", "column"),
    "y += x W^T": _part("y x weight", "y", "base"),
    "y = x W^T + bias + m col^T": _part("x weight bias m col", "y", "base", "column"),
    "p = g col": _part("g col", "p", "column"),
    "dcore = diag(p^T h)": _part("p h", "dcore", "middle"),
    "dh = p B": _part("p core", "dh", "middle"),
    "dx = g W + dh row": _part("g weight dh row", "dx", "base", "row"),
}
# Intermediate tensors: not written to memory where all parts that read them are in the same stage.
BETWEEN = ("h", "m", "p", "dh")


def is_stage(name: str) -> bool:
    """Whether a range's name consists of the parts in :data:`PARTS`."""
    return all(part in PARTS for part in name.split(", "))


@dataclass(frozen=True)
class LayerCall:
    """One call of an adapted layer: forward and, in training, backward.

    Attributes:
        sizes: Tokens, slices and sizes of the layer.
        size: Bytes per element of x, weight, bias, col and row; the core and its gradient are float32.
        bias: Whether the layer has a bias.
        stages: The ranges that the call ran through, in order.
    """

    sizes: CallFlops
    size: int
    bias: bool
    stages: tuple[str, ...]

    def flops(self, stage: str) -> int:
        """FLOPs of one pass through a stage."""
        products = [product for part in stage.split(", ") for product in PARTS[part].products]
        return sum(getattr(self.sizes, product)() for product in products)

    def fewest_bytes(self, stage: str) -> int:
        """Bytes of one pass through a stage: each tensor from outside read once, each that leaves it written once."""
        read: set[str] = set()
        written: set[str] = set()
        for part in stage.split(", "):
            read |= set(PARTS[part].reads) - written
            written.add(PARTS[part].writes)
        others = {name for other in self.stages if other != stage for name in _reads(other)}
        return sum(self._bytes(name) for name in read) + sum(
            self._bytes(name) for name in written if name not in BETWEEN or name in others
        )

    def _bytes(self, tensor: str) -> int:
        s = self.sizes
        core = 4 * s.S * s.c * s.r
        elements = {
            "x": s.T * s.in_, "dx": s.T * s.in_, "y": s.T * s.n * s.out, "g": s.T * s.n * s.out,
            "h": s.T * s.r * s.S, "dh": s.T * s.r * s.S, "m": s.T * s.n * s.c * s.S, "p": s.T * s.n * s.c * s.S,
            "weight": s.n * s.out * s.in_, "bias": s.n * s.out * self.bias, "col": s.out * s.c * s.S,
            "row": s.r * s.S * s.in_,
        }  # fmt: skip
        return core if tensor in ("core", "dcore") else self.size * elements[tensor]


def _reads(stage: str) -> set[str]:
    return {name for part in stage.split(", ") for name in PARTS[part].reads}


@dataclass(frozen=True)
class Count:
    """All passes through one stage in a step: how many, their FLOPs and their fewest bytes."""

    calls: int
    flops: int
    fewest_bytes: int


def count(calls: Iterable[LayerCall]) -> dict[str, Count]:
    """Stage -> its count over all calls, in the order in which stages first run."""
    found: dict[str, Count] = {}
    for call in calls:
        for stage, times in Counter(call.stages).items():
            before = found.get(stage, Count(0, 0, 0))
            found[stage] = Count(
                before.calls + times,
                before.flops + times * call.flops(stage),
                before.fewest_bytes + times * call.fewest_bytes(stage),
            )
    return found


def layer_calls(problem: Problem) -> list[LayerCall]:
    """The calls of adapted layers in one step.

    Runs the network forward once. Which ranges a layer runs through depends on its backend, device and sizes, so one
    layer of each kind is then run by itself under the profiler.
    """
    seen: list[tuple[TCURLayer, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(layer, TCURLayer)
        seen.append((layer, inputs[0]))

    layers = [layer for layer in problem.adapted.modules() if isinstance(layer, TCURLayer)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.set_grad_enabled(problem.case.mode == "training"):
            problem.adapted(*problem.network.runs[0].inputs)
    finally:
        for handle in handles:
            handle.remove()
    known: dict[tuple[object, ...], LayerCall] = {}
    calls = []
    for layer, x in seen:
        key = (layer.weight.shape, layer.num_slices, layer.stack.core.shape, x.shape, x.requires_grad)
        if key not in known:
            known[key] = _one_call(layer, x, problem.case.mode == "training")
        calls.append(known[key])
    return calls


def _one_call(layer: TCURLayer, x: Tensor, training: bool) -> LayerCall:
    """The call of one layer on an input of this shape, run under the profiler."""
    alone = torch.zeros_like(x).requires_grad_(x.requires_grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.set_grad_enabled(training):
            y = layer(alone)
        if training:
            leaves = [layer.stack.core, *([alone] if alone.requires_grad else [])]
            torch.autograd.grad(y, leaves, torch.zeros_like(y))
    ranges = [event for event in profile.events() or [] if event.is_user_annotation and is_stage(event.name)]
    names = [event.name for event in sorted(ranges, key=lambda event: event.time_range.start)]
    rows, in_features = layer.as_matrix(layer.weight).shape
    slices, c, r = layer.stack.core.shape
    n = layer.num_slices
    sizes = CallFlops(x.numel() // in_features, n, slices, rows // n, in_features, c, r, layer.stack.options.transform)
    return LayerCall(sizes, x.element_size(), layer.bias is not None, tuple(names))
