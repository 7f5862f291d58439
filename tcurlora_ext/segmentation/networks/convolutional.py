"""Networks of convolutions: how they are built from sizes, and which sizes their tensors tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

Sizes = Mapping[str, Any]
# The first layer of each, by which a file of its weights is recognised.
FIRST = {"dynunet": "input_block.conv1.conv.weight", "segresnet": "convInit.conv.weight"}


def dynunet(in_channels: int, out_channels: int, roi: tuple[int, ...], sizes: Sizes) -> nn.Module:
    """MONAI's DynUNet, the form of nnU-Net's network; each step up undoes the stride of the step down."""
    from monai.networks.nets import DynUNet

    del roi  # one network serves every size that its strides divide
    net: nn.Module = DynUNet(
        3, in_channels, out_channels, sizes["kernel_size"], sizes["strides"], sizes["strides"][1:], sizes["filters"],
        res_block=bool(sizes["res_block"]),
    )  # fmt: skip
    return net


def segresnet(in_channels: int, out_channels: int, roi: tuple[int, ...], sizes: Sizes) -> nn.Module:
    """MONAI's SegResNet."""
    from monai.networks.nets import SegResNet

    del roi
    net: nn.Module = SegResNet(
        3, int(sizes["init_filters"]), in_channels, out_channels, float(sizes["dropout_prob"]) or None,
        blocks_down=tuple(sizes["blocks_down"]), blocks_up=tuple(sizes["blocks_up"]),
    )  # fmt: skip
    return net


def check_levels(sizes: Sizes) -> None:
    """Raise ValueError where the lists of a DynUNet's complete sizes do not have as many levels each."""
    if "filters" not in sizes:
        return
    levels = {name: len(sizes[name]) for name in ("filters", "strides", "kernel_size")}
    if len(set(levels.values())) > 1 or levels["filters"] < 3:
        raise ValueError(
            f"sizes of dynunet: found {', '.join(f'{name} of {count}' for name, count in levels.items())} levels, "
            "expected as many of each, 3 or more; a list that is not given has its default, so give all three"
        )


def window_multiple(sizes: Sizes, default: int) -> int:
    """What each side of a window has to be a multiple of, in voxels; `default` for a network of other sizes."""
    if "strides" in sizes:
        strides = [max(stride) if isinstance(stride, (list, tuple)) else stride for stride in sizes["strides"]]
        return prod(map(int, strides))
    if "blocks_down" in sizes:
        return 2 ** (len(sizes["blocks_down"]) - 1)
    return int(sizes.get("patch_size", default))


def sizes_of_dynunet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a DynUNet that its tensors tell: all, as a step up undoes the stride of the step down."""
    downs = _numbers(tensors, r"downsamples\.(\d+)\.conv1\.conv\.weight")
    first = [
        f"{block}.conv1.conv.weight" for block in ("input_block", *(f"downsamples.{n}" for n in downs), "bottleneck")
    ]
    ups = _numbers(tensors, r"upsamples\.(\d+)\.transp_conv\.conv\.weight")
    strides = [_side(tensors[f"upsamples.{n}.transp_conv.conv.weight"]) for n in reversed(ups)]
    return {
        "filters": [int(tensors[name].shape[0]) for name in first],
        "kernel_size": [_side(tensors[name]) for name in first],
        "strides": [1, *strides],
        "res_block": "bottleneck.conv3.conv.weight" in tensors,
    }


def sizes_of_segresnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a SegResNet that its tensors tell."""
    return {
        "init_filters": int(tensors[FIRST["segresnet"]].shape[0]),
        "blocks_down": _blocks(tensors, "down_layers"),
        "blocks_up": _blocks(tensors, "up_layers"),
    }


def _blocks(tensors: Mapping[str, Tensor], part: str) -> list[int]:
    """How many residual blocks each level has."""
    levels = _numbers(tensors, rf"{part}\.(\d+)\.\d+\.conv1\.conv\.weight")
    return [len(_numbers(tensors, rf"{part}\.{level}\.(\d+)\.conv1\.conv\.weight")) for level in levels]


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name))})


def _side(weight: Tensor) -> int | list[int]:
    """The side of a kernel, or its three sides where they differ."""
    sides = [int(side) for side in weight.shape[2:]]
    return sides[0] if len(set(sides)) == 1 else sides
