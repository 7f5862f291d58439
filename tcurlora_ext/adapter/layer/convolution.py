"""Adapted convolutions: drop-in forms of ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and their transposed forms."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tcurlora_ext.adapter.options import Rank
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import LayerSlices
from tcurlora_ext.operator.convolution import Geometry

from .linear import TCURLayer
from .uninitialised import refuse_uninitialised

CONVOLUTIONS: tuple[type[_ConvNd], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class TCURConv(TCURLayer):
    """A convolution with a t-CUR adapter: its weight, as a matrix, is one slice of a stack.

    The rows of the matrix are kernels on the input, so that h is a convolution with the r rows of R as kernels:

    - ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: the weight (out, in, k...) is a matrix (out, in k^d). h moves over x
      as the layer does, and C (out, c) is a 1x1 convolution.
    - ``nn.ConvTranspose1d``, ...: the weight (in, out, k...) is a matrix (out k^d, in). h is a 1x1 convolution, and C,
      the kernels of c input channels, a transposed convolution as the layer's.

    Stride, padding, dilation and the mode of padding are the layer's own. The classes of layers are made from the
    plain layer's class, of which they are instances too: :func:`tcurlora_ext.inject` and :meth:`from_conv` make them.

    Attributes:
        kind: The class of the layer without an adapter; the layer is of a subclass of both.
    """

    kind: ClassVar[type[_ConvNd]]
    may_ride = False  # no changed input x' has the delta in its patches

    @classmethod
    def from_conv(
        cls, conv: nn.modules.conv._ConvNd, rank: Rank = 8, *, scale: float | None = None, **options: Any
    ) -> TCURConv:
        """An adapted layer that shares a plain layer's parameters and freezes them. It owns a stack of one slice.

        Args:
            conv: The plain layer; it is not changed, except that its parameters are frozen.
            rank: r, or (c, r).
            scale: None: unit-norm factors and the default rule; a number: raw factors, and this is the scale.
            **options: The other options of :meth:`TCURStack.from_weights`.

        Raises:
            ValueError: The layer has several groups, a class with a forward pass of its own, or no weight yet; or
                :meth:`TCURStack.from_weights` refuses an argument, such as a weight that is not finite.
        """
        refuse_uninitialised(conv, "conv")
        reason = reason_against_conv(conv)
        if reason:
            raise ValueError(f"conv cannot be adapted: {reason}")
        layer = conv_type(type(conv)).adopt(conv)
        weights = conv_matrix(conv, conv.weight.detach()).unsqueeze(0)
        layer.attach(TCURStack.from_weights(weights, rank, scale=scale, **options), 0, 1, owned=True)
        return layer

    def as_matrix(self, stored: Tensor) -> Tensor:
        return conv_matrix(self, stored)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The layer's convolution with the weight W + dW.

        Args:
            x: (N, in, ...) or (in, ...) in the weight's dtype, or in any dtype under autocast.
            output_size: As for the transposed convolutions of PyTorch; not for others.

        Returns:
            (N, out, ...) or (out, ...), as the plain layer.

        Raises:
            RuntimeError: The shape, dtype or device of x does not fit, as for the plain layer.
        """
        self._note_call()
        if self.base is not None:
            result: Tensor = self.kind.forward(self, x, *([] if output_size is None else [output_size]))
            return result
        return convolve(self, self.layer_slices, x, self.training, output_size)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.kind,), self.__dict__


def convolve(
    conv: nn.Module,
    slices: LayerSlices,
    x: Tensor,
    training: bool,
    output_size: list[int] | None = None,
    base: bool = True,
) -> Tensor:
    """The convolution of x by a layer with an adapter.

    Args:
        conv: The layer, whose weight is the base's.
        slices: The slice of a stack that it is.
        x: (N, in, ...) or (in, ...).
        training: Whether dropout applies to the adapter's input.
        output_size: As for the transposed convolutions of PyTorch.
        base: Whether the result has the base's part, with the bias; else it is the adapter's alone.
    """
    assert isinstance(conv, _ConvNd)
    batched = x.dim() > len(conv.kernel_size) + 1
    x, geometry = _placed(conv, x if batched else x.unsqueeze(0), output_size)
    weight, bias = (conv.weight, conv.bias) if base else (None, None)
    y = slices.stack.convolve(x, weight, bias, conv.weight.shape, geometry, slices.first_slice, training)
    return y if batched else y.squeeze(0)


def _placed(conv: _ConvNd, x: Tensor, output_size: list[int] | None) -> tuple[Tensor, Geometry]:
    """The input (N, in, ...), padded where the layer does that by itself, and how the layer moves over it."""
    stride, dilation = list(conv.stride), list(conv.dilation)
    if isinstance(conv, _ConvTransposeNd):
        assert isinstance(conv.padding, tuple)
        padding, space = list(conv.padding), len(stride)
        added = conv._output_padding(x, output_size, stride, padding, list(conv.kernel_size), space, dilation)
        return x, Geometry(stride, padding, dilation, True, list(added))
    none = [0] * len(stride)
    around = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        return nn.functional.pad(x, around, conv.padding_mode), Geometry(stride, none, dilation, False, none)
    if isinstance(conv.padding, tuple):
        return x, Geometry(stride, list(conv.padding), dilation, False, none)
    if conv.padding == "same" and around[::2] != around[1::2]:
        return nn.functional.pad(x, around), Geometry(stride, none, dilation, False, none)
    padding = around[::-2] if conv.padding == "same" else none
    return x, Geometry(stride, padding, dilation, False, none)


def conv_matrix(conv: nn.Module, stored: Tensor) -> Tensor:
    """The weight of a convolution as a matrix, (out, in*k^d) or transposed (out*k^d, in), or its inverse.

    Args:
        conv: The layer, adapted or not.
        stored: A tensor like the layer's weight, or such a matrix; the result shares its memory.
    """
    assert isinstance(conv, _ConvNd)
    if stored.dim() > 2:
        matrix = stored.flatten(1)
        return matrix.T if conv.transposed else matrix
    second = conv.out_channels if conv.transposed else conv.in_channels
    return (stored.T if conv.transposed else stored).unflatten(1, (second, *conv.kernel_size))


def reason_against_conv(conv: nn.Module) -> str:
    """Why a convolution cannot be adapted, as it follows on "... cannot be adapted: "; "" where it can."""
    kind = type(conv)
    plain = next((plain for plain in CONVOLUTIONS if issubclass(kind, plain)), None)
    if plain is None or (kind.forward, kind._conv_forward) != (plain.forward, plain._conv_forward):  # type: ignore[attr-defined]
        expected = ", ".join(one.__name__ for one in CONVOLUTIONS[:3])
        return f"found a {kind.__module__}.{kind.__name__}, expected {expected} or their transposed forms"
    assert isinstance(conv, _ConvNd)
    if conv.groups > 1:
        return f"it has {conv.groups} groups, whose kernels see other channels each, expected groups=1"
    return ""


_types: dict[type[_ConvNd], type[TCURConv]] = {}


def conv_type(kind: type[_ConvNd]) -> type[TCURConv]:
    """The class of adapted layers of a class of convolutions.

    Args:
        kind: The class of the layer without an adapter.
    """
    if kind not in _types:
        _types[kind] = type(f"TCUR{kind.__name__}", (TCURConv, kind), {"kind": kind, "__doc__": TCURConv.__doc__})
    return _types[kind]


def _empty(kind: type[_ConvNd]) -> TCURConv:
    """An instance without state, for copies and pickles: pickle cannot find a class that was made at run time."""
    made = conv_type(kind)
    return made.__new__(made)
