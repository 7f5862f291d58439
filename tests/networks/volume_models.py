"""Networks of MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Inputs

BLOCKS = {"hidden_size": 16, "mlp_dim": 24, "num_heads": 4}


def volume(*sides: int) -> Callable[[], Inputs]:
    """A volume, or with two sides an image."""
    return lambda: {"0": torch.randn(1, 1, *sides)}


def plane() -> Inputs:
    return {"0": torch.randn(1, 1, 16, 16)}


def diffused() -> Inputs:
    return {**plane(), "timesteps": torch.tensor([3]), "context": torch.randn(1, 2, 8)}


def words() -> Inputs:
    return {"0": torch.randint(40, (2, 6)), "context": torch.randn(2, 3, 16)}


def classes() -> Inputs:
    return {
        "0": torch.randn(1, 1, 16, 16, 16), "class_vector": torch.tensor([[1], [2]]),
        "point_coords": torch.randint(16, (2, 2, 3)).float(), "point_labels": torch.ones(2, 2).long(),
    }  # fmt: skip


def of(name: str, network: str, inputs: Callable[[], Inputs], **options: Any) -> Architecture:
    def build() -> nn.Module:
        from monai.networks import nets

        made: nn.Module = getattr(nets, network)(**options)
        return made

    return Architecture(name, f"monai.networks.nets.{network}", build, inputs)


def vista() -> nn.Module:
    """VISTA3D as its package builds it, with narrower parts."""
    from monai.networks.nets import vista3d

    sizes = {"init_filters": 8, "out_channels": 8, "blocks_down": (1, 1, 1), "dsdepth": 1}
    encoder = vista3d.SegResNetDS2(in_channels=1, norm="instance", **sizes)
    points = vista3d.PointMappingSAM(feature_size=8, n_classes=16, last_supported=8)
    named = vista3d.ClassMappingClassify(n_classes=16, feature_size=8, use_mlp=True)
    return vista3d.VISTA3D(image_encoder=encoder, class_head=named, point_head=points)


VOLUME_MODELS = (
    of("UNETR", "UNETR", volume(32, 16, 16), in_channels=1, out_channels=2, img_size=(32, 16, 16), feature_size=4,
       **BLOCKS),
    of("SwinUNETR", "SwinUNETR", volume(64, 64), spatial_dims=2, in_channels=1, out_channels=2, feature_size=12,
       num_heads=(1, 2, 2, 2), norm_name="batch"),
    of("ViT of MONAI", "ViT", volume(16, 16, 16), in_channels=1, img_size=(16, 16, 16), patch_size=(8, 8, 8),
       num_layers=2, **BLOCKS),
    of("ViTAutoEnc", "ViTAutoEnc", volume(32, 32, 32), in_channels=1, img_size=(32, 32, 32), patch_size=(16, 16, 16),
       num_layers=2, **BLOCKS),
    of("MaskedAutoEncoderViT", "MaskedAutoEncoderViT", volume(16, 16, 16), in_channels=1, img_size=(16, 16, 16),
       patch_size=(8, 8, 8), num_layers=2, decoder_hidden_size=12, decoder_mlp_dim=16, decoder_num_layers=2,
       decoder_num_heads=3, hidden_size=24, mlp_dim=24, num_heads=4),
    of("DecoderOnlyTransformer", "DecoderOnlyTransformer", words, num_tokens=40, max_seq_len=8, attn_layers_dim=16,
       attn_layers_depth=2, attn_layers_heads=4, with_cross_attention=True),
    of("DiffusionModelUNet", "DiffusionModelUNet", diffused, spatial_dims=2, in_channels=1, out_channels=1,
       num_res_blocks=1, channels=(8, 16), attention_levels=(False, True), norm_num_groups=4, num_head_channels=4,
       with_conditioning=True, transformer_num_layers=1, cross_attention_dim=8),
    Architecture("VISTA3D", "monai.networks.nets.VISTA3D", vista, classes),
    of("DynUNet", "DynUNet", volume(16, 16, 16), spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3, 3, 3],
       strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8]),
    of("SegResNet", "SegResNet", volume(16, 16, 16), init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
)  # fmt: skip
