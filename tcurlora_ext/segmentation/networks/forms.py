"""Forms that weights of transformers for segmentation have in files: recognising one, and naming its tensors as here.

A file holds a whole network, or its encoder alone as self-supervised pretraining leaves it: `model_swinvit.pt` and
disruptive autoencoders for SwinUNETR; MONAI's ViT, ViTAutoEnc and MaskedAutoEncoderViT for the networks with a ViT.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tcurlora_ext.segmentation.networks.building import NETWORKS, NetworkSpec
from tcurlora_ext.segmentation.networks.convolutional import FIRST, sizes_of_dynunet, sizes_of_segresnet

Tensors = dict[str, Tensor]

# The first layer of a Swin transformer or of a ViT, with what stands before it; ".1" is MONAI's form "perceptron".
_FIRST = re.compile(r"((?:.+\.)?)(patch_embed\.proj|patch_embedding\.patch_embeddings(?:\.1)?)\.weight")
_ENCODERS = {"patch_embed.proj": "swinViT.", "patch_embedding.patch_embeddings": "vit."}
# Names that only one architecture has outside its encoder.
_OUTSIDE = {"swinunetr": "encoder10.", "unetr": "encoder2.", "vit": "decoder.0."}
_PATCH = "vit.patch_embedding.patch_embeddings"
# Every block of MONAI's ViT has this norm since version 1.3; the forward pass does not use it.
UNUSED = ".norm_cross_attn."
HEAD_WIDTH = 64  # of an attention head, in nearly all transformers


@dataclass(frozen=True)
class Form:
    """How the tensors of a file are named.

    Attributes:
        encoder: The prefix of the transformer in the networks here: "vit." or "swinViT."; "" where there is none.
        prefix: What stands in its place in the file.
        network: The architecture; None where an encoder fits several.
        whole: Whether the file holds a whole network.
    """

    encoder: str
    prefix: str
    network: str | None
    whole: bool


def find_form(names: Collection[str]) -> Form | None:
    """The form of a file with tensors of these names; None where it has no first layer that is known."""
    for network, first in FIRST.items():
        if first in names:
            return Form("", "", network, True)
    match = next((found for name in sorted(names) if (found := _FIRST.fullmatch(name))), None)
    if match is None:
        return None
    prefix, encoder = match[1], _ENCODERS[match[2].removesuffix(".1")]
    if f".{prefix}".endswith(f".{encoder}"):
        outer = prefix.removesuffix(encoder)
        for network, part in _OUTSIDE.items():
            if any(name.startswith(outer + part) for name in names) and NETWORKS[network].blocks.startswith(encoder):
                return Form(encoder, outer, network, True)
    return Form(encoder, prefix, "swinunetr" if encoder == "swinViT." else None, False)


def plain_tensors(tensors: Mapping[str, Tensor], form: Form, patch: int | None) -> tuple[Tensors, list[str], list[str]]:
    """Tensors under the names that they have in the networks here.

    Args:
        tensors: Of a file, without what wrappers have put into names.
        form: Of the file.
        patch: Side of a patch where the patch embedding may be a linear layer; None to tell it from the weights.

    Returns:
        The tensors; the names of those of an encoder's file that lie outside it; and what was converted, in words.
    """
    start = "" if form.whole else form.encoder
    named: Tensors = {}
    outside, converted = [], []
    for name, tensor in tensors.items():
        if not name.startswith(form.prefix):
            if form.whole:
                named[name] = tensor
            else:
                outside.append(name.removeprefix(form.prefix.removesuffix(form.encoder)))
            continue
        named[start + _renamed(name.removeprefix(form.prefix))] = tensor
    if (linear := named.pop(f"{_PATCH}.1.weight", None)) is not None:
        named[f"{_PATCH}.weight"] = as_convolution(linear, patch)
        named[f"{_PATCH}.bias"] = named.pop(f"{_PATCH}.1.bias")
        converted.append("the patch embedding, a linear layer ('perceptron'), is taken as an equal convolution")
    for name in [name for name in named if name.endswith("cls_token")]:
        del named[name]  # of early versions of MONAI, which never used it, or of a classifier
        if not form.whole:
            outside.append("cls_token")
    last = _norm_of_blocks(named)
    if last is not None:
        for part in ("weight", "bias"):
            named[f"vit.norm.{part}"] = named.pop(f"{last}.{part}")
    return named, outside, converted


def _renamed(name: str) -> str:
    """A name in a Swin transformer's MLP or in a disruptive autoencoder's stages, as MONAI's SwinUNETR has it."""
    name = re.sub(r"^(layers\d)\.0\.0\.", r"\1.0.", name)
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name) if name.startswith(("layers", "swinViT.")) else name


def _norm_of_blocks(named: Tensors) -> str | None:
    """The norm after the blocks, where it is the last of them as in MaskedAutoEncoderViT."""
    found = [name for name in named if re.fullmatch(r"vit\.blocks\.\d+\.weight", name)]
    return found[0].removesuffix(".weight") if found else None


def as_convolution(linear: Tensor, patch: int | None = None) -> Tensor:
    """The convolution (hidden, C, p, p, p) that is equal to a linear layer (hidden, p p p C) on patches.

    Args:
        linear: Its weight.
        patch: Side p of a patch; None: the largest power of two of which whole channels result.
    """
    hidden, width = linear.shape
    sides = [patch] if patch else [2**power for power in range(7, 0, -1)]
    side = next((side for side in sides if width % side**3 == 0), None)
    if side is None:
        raise ValueError(f"found {width} inputs of a patch embedding, expected a multiple of {sides[0]}**3")
    return linear.reshape(hidden, side, side, side, width // side**3).permute(0, 4, 1, 2, 3).contiguous()


def infer_sizes(spec: NetworkSpec, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a network that can be told from its tensors; those of an encoder's file are those of the encoder."""
    if spec.name == "dynunet":
        return sizes_of_dynunet(tensors)
    if spec.name == "segresnet":
        return sizes_of_segresnet(tensors)
    if spec.name == "swinunetr":
        stages = range(1, 5)
        depths = [_count(tensors, rf"swinViT\.layers{stage}\.0\.blocks\.(\d+)\.") for stage in stages]
        tables = [
            tensors.get(f"swinViT.layers{stage}.0.blocks.0.attn.relative_position_bias_table") for stage in stages
        ]  # fmt: skip
        heads = [int(table.shape[1]) for table in tables if table is not None]
        return {
            "feature_size": int(tensors["swinViT.patch_embed.proj.weight"].shape[0]), "depths": depths,
            "use_v2": any(name.startswith("swinViT.layers1c.") for name in tensors),
            **({"num_heads": heads} if len(heads) == 4 else {}),
        }  # fmt: skip
    first, mlp = tensors[f"{_PATCH}.weight"], tensors.get("vit.blocks.0.mlp.linear1.weight")
    sizes: dict[str, Any] = {"hidden_size": int(first.shape[0]), "qkv_bias": "vit.blocks.0.attn.qkv.bias" in tensors}
    if mlp is not None:
        sizes["mlp_dim"] = int(mlp.shape[0])
    if spec.name == "vit":
        sizes |= {"patch_size": int(first.shape[2]), "num_layers": _count(tensors, r"vit\.blocks\.(\d+)\.")}
        return sizes | ({"features": int(tensors["out.weight"].shape[1])} if "out.weight" in tensors else {})
    if (feature := tensors.get("encoder1.layer.conv1.conv.weight")) is not None:
        sizes |= {
            "feature_size": int(feature.shape[0]),
            "conv_block": "encoder2.blocks.0.conv.weight" not in tensors,
            "res_block": "decoder5.conv_block.conv3.conv.weight" in tensors,
        }
    return sizes


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def infer_heads(spec: NetworkSpec, hidden: int) -> int | None:
    """How many attention heads a ViT of this width has by convention, as weights do not say; None where none fits."""
    if hidden == spec.sizes["hidden_size"]:
        return int(spec.sizes["num_heads"])
    return hidden // HEAD_WIDTH if hidden % HEAD_WIDTH == 0 else None


def infer_window(tensors: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """The window of a ViT, if its position embeddings are those of a cube of patches."""
    places = int(tensors["vit.patch_embedding.position_embeddings"].shape[1])
    side = round(places ** (1 / 3))
    if side**3 != places:
        return None
    length = side * int(tensors[f"{_PATCH}.weight"].shape[2])
    return (length, length, length)
