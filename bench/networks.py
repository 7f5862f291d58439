"""The frozen networks of the cases, with random inputs and gradients of their outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Case, Layer

# Successive steps take different inputs, so that a step finds none in a cache: 256 MiB is more than any GPU's L2
# (H100: 50, H200: 60, B200: 126 MiB) and most processors' L3. A step of a whole network moves more than that by itself.
ROTATED_BYTES = 2**28
MOST_INPUTS = 64  # with few tokens the weights fill the cache, not the inputs


@dataclass(frozen=True)
class Run:
    """The inputs of one forward pass, and the gradients of its outputs; None where the output is a scalar loss."""

    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Network:
    """A frozen network without adapters.

    Attributes:
        module: The network.
        runs: Its inputs; steps take one after the other.
        targets: Names of the layers that get an adapter.
        fused: Last component of a layer's name -> how many slices the layer's weight holds.
        repeats: How often the whole model has this network: its stacks have so many times as many slices.
        trained: Prefixes of the names of parameters that train beside the adapter; AdamW updates them.
    """

    module: nn.Module
    runs: list[Run]
    targets: list[str]
    fused: dict[str, int]
    repeats: int = 1
    trained: tuple[str, ...] = ()


class Bank(nn.Module):
    """Layers of one shape side by side, each on an input of its own, as in a network."""

    def __init__(self, layer: Layer, count: int) -> None:
        super().__init__()
        name = "fused" if layer.slices > 1 else "linear"
        for index in range(count):
            self.add_module(f"{name}{index}", nn.Linear(layer.in_features, layer.slices * layer.out_features))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # An adapted model has a container of stacks as its last child.
        return tuple(layer(x) for layer, x in zip(self.children(), inputs, strict=False))


class LlamaBlock(nn.Module):
    """One decoder block of Llama-7B with random weights, on x (1, T, 4096)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
        config._attn_implementation = "sdpa"
        self.block = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.block(x, position_embeddings=self.rotary(x, positions))


class UnetrLoss(nn.Module):
    """UNETR for crops of 128^3 with its training loss, Dice and cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        from monai.losses import DiceCELoss
        from monai.networks.nets import UNETR

        self.unetr = UNETR(in_channels=1, out_channels=3, img_size=(128, 128, 128))
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.loss(self.unetr(image), label)


def build(case: Case, device: torch.device) -> Network:
    """The network of a case on the device, in the case's dtype; a fixed seed makes its weights and inputs."""
    torch.manual_seed(0)
    with torch.device(device):
        network = _BUILDERS[case.network](case)
    network.module.to(getattr(torch, case.dtype)).requires_grad_(False)
    return network


def _normal(case: Case, *shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(getattr(torch, case.dtype)).requires_grad_(requires_grad)


def _linear_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if type(layer) is nn.Linear]


def _bank(case: Case) -> Network:
    layer = case.layer
    assert layer is not None
    count = layer.stack // layer.slices if case.network == "stack" else 1
    if count * layer.slices > layer.stack or layer.stack % (count * layer.slices):
        raise ValueError(f"{case.name}: {count} x {layer.slices} slices do not fill a stack of {layer.stack}")
    bank = Bank(layer, count)
    rows = layer.slices * layer.out_features
    training = case.mode == "training"
    size = getattr(torch, case.dtype).itemsize * count * case.tokens * (layer.in_features + training * rows)
    runs = [
        Run(
            tuple(_normal(case, case.tokens, layer.in_features, requires_grad=training) for _ in range(count)),
            tuple(_normal(case, case.tokens, rows) for _ in range(count)) if training else None,
        )
        for _ in range(min(MOST_INPUTS, math.ceil(ROTATED_BYTES / size)))
    ]
    names = _linear_names(bank)
    return Network(bank, runs, names, dict.fromkeys(names, layer.slices), layer.stack // (count * layer.slices))


def _encoder(case: Case) -> Network:
    from monai.networks.blocks.transformerblock import TransformerBlock

    encoder = nn.Sequential(*(TransformerBlock(768, 3072, 12) for _ in range(12)), nn.LayerNorm(768))
    # A crop of 128^3 is 512 tokens.
    shape = (max(1, case.tokens // 512), min(case.tokens, 512), 768)
    return _tokens_in_and_out(case, encoder, shape, {"qkv": 3}, 1)


def _llama_block(case: Case) -> Network:
    return _tokens_in_and_out(case, LlamaBlock(), (1, case.tokens, 4096), {}, 32)


def _tokens_in_and_out(
    case: Case, module: nn.Module, shape: tuple[int, ...], fused: dict[str, int], repeats: int
) -> Network:
    """A network whose output has the shape of its input; the input, an embedding's output, requires a gradient."""
    training = case.mode == "training"
    run = Run((_normal(case, *shape, requires_grad=training),), (_normal(case, *shape),) if training else None)
    return Network(module, [run], _linear_names(module), fused, repeats)


def _unetr_step(case: Case) -> Network:
    module = UnetrLoss()
    crops = max(1, case.tokens // 512)
    label = torch.randint(0, 3, (crops, 1, 128, 128, 128)).to(getattr(torch, case.dtype))
    run = Run((_normal(case, crops, 1, 128, 128, 128), label), None)
    targets = [name for name in _linear_names(module) if ".vit.blocks." in name]
    return Network(module, [run], targets, {"qkv": 3}, 1, ("unetr.decoder", "unetr.out"))


def _convolution(case: Case) -> Network:
    return _volumes(case, nn.Sequential(nn.Conv3d(64, 64, 3, padding=1)), 64, 64, 1)


def _convolution_encoder(case: Case) -> Network:
    """The steps down of MONAI's DynUNet with 16 to 128 channels, after its first convolution."""
    from monai.networks.nets import DynUNet

    net = DynUNet(3, 16, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, [16, 32, 64, 128])
    return _volumes(case, nn.Sequential(net.input_block, *net.downsamples, net.bottleneck), 16, 128, 8)


def _volumes(case: Case, module: nn.Module, channels: int, features: int, reduction: int) -> Network:
    """A network of convolutions on a cube, whose sides it divides by ``reduction``."""
    training, side = case.mode == "training", round(case.tokens ** (1 / 3))
    x = _normal(case, 1, channels, *[side] * 3, requires_grad=training)
    g = _normal(case, 1, features, *[side // reduction] * 3)
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Conv3d]
    return Network(module, [Run((x,), (g,) if training else None)], names, {})


_BUILDERS = {
    "layer": _bank,
    "stack": _bank,
    "encoder": _encoder,
    "llama block": _llama_block,
    "unetr step": _unetr_step,
    "convolution": _convolution,
    "convolution encoder": _convolution_encoder,
}
