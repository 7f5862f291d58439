"""Which convolutions are adapted by default: those of a model without a linear layer that the default adapts.

All are, in stacks of equal shape, but for

1. the stem: the model's first convolution, and others that take the same image;
2. heads, by their names: ``out``, ``final``, ``seg_layers``, ``heads`` and the like;
3. convolutions narrower than the rank: of fewer output channels, as a head of few classes, or of a smaller matrix;
4. what cannot be adapted: several groups, or a class with a forward pass of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .support import features_of, is_convolution, reason_against

# A volume of several contrasts, or a picture with transparency.
_CHANNELS_OF_AN_IMAGE = 4
# Components of the names of heads, in MONAI, nnU-Net, torchvision and segmentation_models_pytorch.
_HEAD = re.compile(
    r"(.*_)?(heads?|classifiers?)|(seg|segmentation|output|final|out|conv_final|final_conv|conv_out)(_?(blocks?|layers?|convs?))?"
)


def convolutions_left_out(model: nn.Module, rank: int) -> dict[str, str]:
    """:func:`left_out_among` all convolutions of a model.

    Args:
        model: The model.
        rank: The larger of c and r.
    """
    return left_out_among({name: module for name, module in model.named_modules() if is_convolution(module)}, rank)


def left_out_among(layers: Mapping[str, nn.Module], rank: int) -> dict[str, str]:
    """Why the default leaves a convolution out, by the names of all; "" for those that it adapts.

    Args:
        layers: The convolutions of a model by name, in the order in which it registers them.
        rank: The larger of c and r.
    """
    first = next(iter(layers.values()), None)

    def reason(name: str, conv: nn.Module) -> str:
        assert isinstance(conv, _ConvNd)
        assert isinstance(first, _ConvNd)
        takes_image = conv.in_channels == first.in_channels <= min(_CHANNELS_OF_AN_IMAGE, first.out_channels - 1)
        if conv is first or takes_image:
            return "a stem"
        if any(map(_HEAD.fullmatch, name.split("."))):
            return "a head"
        if min(conv.out_channels, *features_of(conv)) < rank:
            return f"narrower than the rank {rank}"
        return reason_against(conv)

    return {name: reason(name, conv) for name, conv in layers.items()}


def positions(conv: nn.Module, shape: Sequence[int]) -> int:
    """How many products of its weight's matrix with a vector a convolution computes.

    They are the voxels of all samples: of the output, or of the input of a transposed convolution.

    Args:
        conv: The convolution.
        shape: That of its input, (N, in, ...) or (in, ...).
    """
    assert isinstance(conv, _ConvNd)
    space = len(conv.kernel_size)
    samples, voxels = prod(shape[: -space - 1]), shape[-space:]
    if conv.transposed:
        return samples * prod(voxels)
    around = conv._reversed_padding_repeated_twice[::-1]
    sides = zip(voxels, around[::2], around[1::2], conv.kernel_size, conv.dilation, conv.stride, strict=True)
    return samples * prod((n + a + b - d * (k - 1) - 1) // s + 1 for n, a, b, k, d, s in sides)


def elements_before(conv: nn.Module, count: int) -> int:
    """The elements of the input where :func:`positions` are ``count``: stride^d times as many voxels, up to borders."""
    assert isinstance(conv, _ConvNd)
    return count * conv.in_channels * (1 if conv.transposed else prod(conv.stride))
