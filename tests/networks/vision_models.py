"""Networks for images of transformers, timm and torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Inputs
from .language_models import WIDTH, of, tokens

VISION = {**WIDTH, "intermediate_size": 24, "image_size": 16, "patch_size": 4}
STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
PYRAMID = {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 8, 16, 16]}
WORDS = {**WIDTH, "vocab_size": 40, "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DECODER = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16}


def image() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def larger() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def largest() -> Inputs:
    return {"pixel_values": torch.randn(1, 3, 64, 64)}


def video() -> Inputs:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def points() -> Inputs:
    return {**larger(), "input_points": 32 * torch.rand(2, 1, 2, 2), "input_labels": torch.ones(2, 1, 2).long()}


def captioned() -> Inputs:
    return {**image(), **tokens()}


def positional(side: int) -> Any:
    return lambda: {"0": torch.randn(2, 3, side, side)}


def two(name: str, model: str, **options: Any) -> Architecture:
    """A network with a tower for text and one for images."""
    return of(name, model, captioned, text_config=WORDS, vision_config=VISION, **options)


def timm(name: str, model: str, side: int = 32, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(model, num_classes=3, **options)
        for module in made.modules():  # Swin v2's blocks begin as the identity, with norms of weight 0
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        return made

    return Architecture(name, "timm.create_model", build, positional(side))


def torchvision(name: str, model: str, side: int = 32, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import torchvision

        made: nn.Module = getattr(torchvision.models, model)(num_classes=3, **options)
        return made

    return Architecture(name, f"torchvision.models.{model}", build, positional(side))


VISION_MODELS = (
    of("ViT", "ViTForImageClassification", image, **VISION),
    of("DeiT", "DeiTForImageClassification", image, **VISION),
    of("MAE", "ViTMAEModel", image, **VISION),
    of("BEiT", "BeitForImageClassification", image, **VISION),
    of("DINOv2", "Dinov2Model", image, **{**VISION, "mlp_ratio": 2}),
    of("DINOv2 with registers", "Dinov2WithRegistersModel", image, **{**VISION, "mlp_ratio": 2}),
    of("DINOv3", "DINOv3ViTModel", image, **VISION),
    of("DINOv3 ConvNeXt", "DINOv3ConvNextModel", larger, **PYRAMID, layer_scale_init_value=1.0),
    of("I-JEPA", "IJepaModel", image, **VISION),
    of("Swin", "SwinForImageClassification", larger, **STAGES),
    of("Swin v2", "Swinv2ForImageClassification", image, **{**STAGES, "image_size": 16}),
    of("Hiera", "HieraModel", larger, embed_dim=8, image_size=[32, 32], patch_stride=[4, 4], depths=[2, 2],
       num_heads=[1, 2], num_query_pool=1, masked_unit_size=[4, 4], masked_unit_attention=[True, False]),
    of("SegFormer", "SegformerForSemanticSegmentation", larger, **{**PYRAMID, "num_attention_heads": [1, 2, 2, 2]},
       decoder_hidden_size=16),
    of("PVT v2", "PvtV2ForImageClassification", larger, **PYRAMID, image_size=32, num_attention_heads=[1, 2, 2, 2]),
    of("CvT", "CvtForImageClassification", larger, embed_dim=[8, 8, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    of("ConvNeXt", "ConvNextForImageClassification", larger, **PYRAMID, layer_scale_init_value=1.0),
    of("ResNet", "ResNetForImageClassification", larger, embedding_size=8, hidden_sizes=[8, 8, 16, 16],
       depths=[1, 1, 1, 1], layer_type="basic"),
    of("DPT", "DPTForDepthEstimation", larger, **{**VISION, "image_size": 32, "patch_size": 8, "num_hidden_layers": 4},
       backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8),
    of("VideoMAE", "VideoMAEForVideoClassification", video, **VISION, num_frames=4),
    of("SAM", "SamModel", points,
       vision_config={**VISION, "image_size": 32, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1],
                      "mlp_dim": 24, "num_pos_feats": 8},
       prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
       mask_decoder_config=DECODER),
    of("SAM 2", "Sam2Model", largest,
       vision_config={"backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 8,
                                          "num_attention_heads": 1, "image_size": [64, 64],
                                          "blocks_per_stage": [1, 2, 2, 1], "embed_dim_per_stage": [8, 16, 24, 32],
                                          "num_attention_heads_per_stage": [1, 2, 2, 2],
                                          "window_size_per_stage": [8, 4, 4, 4],
                                          "window_positional_embedding_background_size": [4, 4],
                                          "global_attention_blocks": [4]},
                      "backbone_channel_list": [32, 24, 16, 8], "fpn_hidden_size": 16,
                      "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
       prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
       mask_decoder_config=DECODER),
    two("CLIP", "CLIPModel", projection_dim=8),
    two("SigLIP", "SiglipModel"),
    timm("ViT of timm", "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    timm("BEiT of timm", "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    timm("EVA-02 of timm", "eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    timm("Swin of timm", "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
         window_size=4),
    timm("Swin v2 of timm", "swinv2_tiny_window8_256", img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
         window_size=4),
    timm("MLP-Mixer of timm", "mixer_s32_224", side=64, img_size=64),
    torchvision("ViT of torchvision", "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4,
                hidden_dim=32, mlp_dim=48),
    torchvision("Swin of torchvision", "SwinTransformer", patch_size=[4, 4], embed_dim=16, depths=[2, 2],
                num_heads=[2, 4], window_size=[4, 4]),
    torchvision("ConvNeXt of torchvision", "convnext_tiny"),
    torchvision("ResNet of torchvision", "resnet18"),
)  # fmt: skip
