"""What one adapted layer computes and keeps in a training step, from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.maths.flops import CallFlops
from tcurlora_ext.maths.transforms import CallShape, with_middle_product


@dataclass(frozen=True)
class LayerCost:
    """One layer with T tokens and n of the stack's S slices of (out, in_)."""

    T: int
    n: int
    S: int
    out: int
    in_: int
    c: int
    r: int
    config: TCURConfig

    @property
    def _folds_core(self) -> bool:
        return self.config.core_domain == "slice" and self.config.along.shares_core

    @property
    def _blocks(self) -> int:
        return self.config.blocks(self.S)

    @property
    def _low(self) -> bool:
        return self._blocks < self.S

    @property
    def _shape(self) -> CallShape:
        return self.config.along.call_shape(self.S, self.n, self._blocks)

    @property
    def _calls(self) -> int:
        return self._shape.calls

    @property
    def _call(self) -> CallFlops:
        calls, blocks, transform = self._shape
        return CallFlops(self.T, self.n // calls, blocks, self.out, self.in_, self.c, self.r, transform)

    @property
    def _drops(self) -> bool:
        return self.config.dropout > 0

    @property
    def _keeps_h(self) -> bool:
        return self._drops or self.r * self._call.S <= self.in_

    def _core_transform(self) -> int:
        """U into the Fourier domain: once a call where the core is kept as slices."""
        return 2 * self.S * self.S * self.c * self.r if self._folds_core else 0

    def base(self) -> int:
        """Of the frozen layer: forward, or dx."""
        return self._calls * self._call.base_product()

    def forward(self) -> int:
        return self._calls * self._call.forward() + self._core_transform()

    def backward(self) -> int:
        """Of the adapter, core transform included."""
        trains_all = self.config.trainable == "all"
        flops = self._call.backward((True, False, False, trains_all, True, trains_all), self._keeps_h)
        if self._drops and trains_all:
            flops -= self._call.middle_product()  # m was kept
        return self._calls * flops + self._core_transform()

    def saved(self) -> tuple[int, bool]:
        """Numbers that the layer keeps for itself, and whether it keeps x."""
        trains_all = self.config.trainable == "all"
        h = self._calls * self.T * self.r * self._call.S
        if not self._drops:
            return h if self._keeps_h else 0, not self._keeps_h or trains_all
        return h + self._saved_by_dropout(trains_all), False

    def _saved_by_dropout(self, trains_all: bool) -> int:
        """The mask, as the CPU keeps it; B; for trained factors the dropped x and m, which no other layer shares."""
        pairs = with_middle_product(self._call.transform).pair_blocks(self._call.S)
        in_pairs = pairs.stop - pairs.start
        blocks = self.n * self.c * self.r * (self._call.S + in_pairs)
        m = self.T * self.n * self.c * self._call.S
        return self.T * self.in_ * (2 if trains_all else 1) + blocks + (m if trains_all else 0)

    def saved_casts(self, size: int) -> int:
        """Bytes of temporary copies that autograd keeps: of a core, of trained factors in a short dtype."""
        wide = max(4, size)
        copies = 0
        if self._folds_core:
            core = 0 if self._drops else self.S * self.c * self.r
            copies += (self.S * self.S + core) * wide
        if self._low and not self._drops:
            copies += self.n * self._blocks * self.c * self.r * wide
        if self.config.trainable == "all" and size < wide:
            copies += self._blocks * (self.out * self.c + self.r * self.in_) * size
        return copies
