"""FLOPs and saved tensors of one adapted layer in a training step, computed from its sizes, for each form."""

from __future__ import annotations

from dataclasses import dataclass

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.maths.flops import CallFlops, ConvolutionFlops, RidingFlops
from tcurlora_ext.maths.transforms import CallShape, with_middle_product


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer with T tokens, whose weight is n of the stack's S slices of shape (out, in_)."""

    T: int
    n: int
    S: int
    out: int
    in_: int
    c: int
    r: int
    config: TCURConfig

    @property
    def _drops(self) -> bool:
        return self.config.dropout > 0


def layer_cost(sizes: LayerSizes) -> RidingCost | LayerCost:
    """The cost of a linear layer in the form that its stack takes."""
    kind = RidingCost if sizes.config.rides(sizes.S) else LayerCost
    return kind(**vars(sizes))


@dataclass(frozen=True)
class ConvolutionCost(LayerSizes):
    """The cost of a convolution, whose weight is a matrix: T as for :class:`ConvolutionFlops`.

    Attributes:
        transposed: Whether it is a transposed one.
        elements: The number of elements of x.
    """

    transposed: bool
    elements: int

    @property
    def _call(self) -> ConvolutionFlops:
        blocks = self.config.along.call_shape(self.S, 1, self.config.blocks(self.S)).blocks
        return ConvolutionFlops(self.T, self.out, self.in_, self.c * blocks, self.r * blocks, self.transposed)

    @property
    def _keeps_h(self) -> bool:
        return self.config.trainable == "core" and self.T * self._call.q_r <= self.elements

    def base(self) -> int:
        """FLOPs of the frozen layer in forward; its dx in backward takes as many."""
        return self._call.base_product()

    def forward(self) -> int:
        """FLOPs of the adapter in forward."""
        return self._call.forward()

    def backward(self) -> int:
        """FLOPs of the adapter in backward; trained C and R take a product of their own each."""
        trains_all, call = self.config.trainable == "all", self._call
        extra = call.row_product() + (call.middle_product() + call.column_product()) * self.transposed
        return call.backward(self._keeps_h) + extra * trains_all

    def saved(self) -> tuple[int, bool]:
        """The number of elements that the layer alone saves for backward, and whether it also saves x."""
        kept = 0
        if self._drops:
            kept = self.elements * (1 if self._keeps_h else 2)  # the mask, and what it leaves of x
        return kept + (self.T * self._call.q_r if self._keeps_h else 0), not self._keeps_h and not self._drops

    def saved_casts(self, size: int) -> int:
        """0: what autograd saves of matrices without voxels is not counted."""
        return 0


@dataclass(frozen=True)
class RidingCost(LayerSizes):
    """The cost of a layer whose adapter rides on the base product."""

    @property
    def _call(self) -> RidingFlops:
        return RidingFlops(self.T, self.out, self.in_, self.c, self.r)

    def base(self) -> int:
        """FLOPs of the frozen layer in forward; its dx in backward takes as many."""
        return self.n * self._call.base_product()

    def _core_product(self) -> int:
        """FLOPs of the stack's cores times the matrices that make the chosen columns orthonormal, in each call."""
        return 2 * self.S * self.c * self.c * self.r if self.config.orthonormal else 0

    def forward(self) -> int:
        """FLOPs of the adapter in forward."""
        return self.n * (self._call.forward() + self._core_product())

    def backward(self) -> int:
        """FLOPs of the adapter in backward."""
        return self.n * (self._call.backward((True, True, False)) + self._core_product())

    def saved(self) -> tuple[int, bool]:
        """The number of elements that the layer saves for backward, in the dtype of x; it does not save x."""
        # With dropout, which PyTorch's operations compute, the mask and the changed features; more in saved_casts.
        return (self.T * (self.in_ + self.n * self.c) if self._drops else self.n * self.T * self.r), False

    def saved_casts(self, size: int) -> int:
        """Bytes saved in at least float32: with dropout h, scale * diag(gain) U, and scale * gain."""
        if self._drops:
            saved = self.T * self.r + self.c * self.r + self.c
        else:  # with orthonormal columns the cores between the chosen columns themselves, and ones in place of a gain
            saved = self.S * self.c * self.r + self.c if self.config.orthonormal else 0
        return self.n * saved * max(4, size)


@dataclass(frozen=True)
class LayerCost(LayerSizes):
    """The cost of a layer whose adapter is computed beside the base product."""

    @property
    def _folds_core(self) -> bool:
        return self.config.core_domain == "slice" and self.config.along.shares_core

    @property
    def _blocks(self) -> int:
        return self.config.blocks(self.S)

    @property
    def _truncated(self) -> bool:
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
    def _keeps_h(self) -> bool:
        return self._drops or self.r * self._call.S <= self.in_

    def _core_transform(self) -> int:
        """FLOPs of the transform of U, which each call computes where the core is in the domain "slice"."""
        return 2 * self.S * self.S * self.c * self.r if self._folds_core else 0

    def base(self) -> int:
        """FLOPs of the frozen layer in forward; its dx in backward takes as many."""
        return self._calls * self._call.base_product()

    def forward(self) -> int:
        """FLOPs of the adapter in forward, core transform included."""
        return self._calls * self._call.forward() + self._core_transform()

    def backward(self) -> int:
        """FLOPs of the adapter in backward, core transform included."""
        trains_all = self.config.trainable == "all"
        flops = self._call.backward((True, False, False, trains_all, True, trains_all), self._keeps_h)
        if self._drops and trains_all:
            flops -= self._call.middle_product()  # dropout's form saves m
        return self._calls * flops + self._core_transform()

    def saved(self) -> tuple[int, bool]:
        """The number of elements that the layer alone saves for backward, and whether it also saves x."""
        trains_all = self.config.trainable == "all"
        h = self._calls * self.T * self.r * self._call.S
        if not self._drops:
            return h if self._keeps_h else 0, not self._keeps_h or trains_all
        return h + self._saved_by_dropout(trains_all), False

    def _saved_by_dropout(self, trains_all: bool) -> int:
        """Elements saved with dropout: the mask, as on the CPU, and B; with trained factors the dropped x and m too."""
        pairs = with_middle_product(self._call.transform).pair_blocks(self._call.S)
        in_pairs = pairs.stop - pairs.start
        blocks = self.n * self.c * self.r * (self._call.S + in_pairs)
        m = self.T * self.n * self.c * self._call.S
        return self.T * self.in_ * (2 if trains_all else 1) + blocks + (m if trains_all else 0)

    def saved_casts(self, size: int) -> int:
        """Bytes of temporary copies that autograd saves: of the core, and of trained factors cast to another dtype."""
        wide = max(4, size)
        copies = 0
        if self._folds_core:
            core = 0 if self._drops else self.S * self.c * self.r
            copies += (self.S * self.S + core) * wide
        if self._truncated and not self._drops:
            copies += self.n * self._blocks * self.c * self.r * wide
        if self.config.trainable == "all" and size < wide:
            copies += self._blocks * (self.out * self.c + self.r * self.in_) * size
        return copies
