"""Segmentation networks by name: how to build each, and which parameters are its head, decoder and transformer blocks.

`unetr` and `swinunetr` are MONAI's. `vit` is a ViT with a decoder but no skip connections: the decoder reads the last
tokens only, so every prediction goes through the transformer. In the other two, skip connections can carry most of the
information past it: with its trained blocks replaced by random ones a small UNETR lost 1.5 points of Dice, `vit` nearly
all of it. Adapters *inside* the transformer can only be compared in a network that uses it.

`dynunet` and `segresnet` are MONAI's networks of convolutions, which are what is adapted there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.targets import find_targets
from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.io.tensors import match_names, not_finite
from tcurlora_ext.io.tensors import read_weights as read_weights  # also known by this name
from tcurlora_ext.segmentation.networks.convolutional import FIRST, check_levels, dynunet, segresnet, window_multiple
from tcurlora_ext.segmentation.packages import require_package

Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class NetworkSpec:
    """One architecture.

    Attributes:
        name: In options and network.json.
        description: In a few words.
        construct: Builds it from input channels, output channels, window and sizes.
        sizes: Default sizes.
        head, decoder, blocks: Prefixes of the names of these parameters; the decoder includes the head. Blocks are
            those of a transformer, or the steps down of a network of convolutions.
        also_train: What trains beside an adapter by default, "head" or "decoder".
        multiple: Each side of the window is a multiple of it, in voxels.
        inputs: Names of the weights that read the image.
        blocks_are: What the blocks are, in words.
    """

    name: str
    description: str
    construct: Callable[[int, int, tuple[int, ...], Sizes], nn.Module]
    sizes: Sizes
    head: tuple[str, ...]
    decoder: tuple[str, ...]
    blocks: str
    also_train: str
    multiple: int
    inputs: tuple[str, ...]
    blocks_are: str = "transformer blocks"


@dataclass(frozen=True)
class NetworkConfig:
    """All that is needed to build a network again, kept in `network.json` beside its weights.

    Attributes:
        network: The architecture's name.
        in_channels: Of an image.
        out_channels: Classes, with the background.
        roi: The window in voxels.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.
        sizes: Sizes that differ from the architecture's defaults.
    """

    network: str
    in_channels: int
    out_channels: int
    roi: tuple[int, int, int]
    spacing: tuple[float, float, float] | None = None
    sizes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the configuration as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> NetworkConfig:
        """Read `network.json`; ValueError names the file and the keys that are missing or unknown."""
        content = read_json(path)
        expected = set(cls.__dataclass_fields__)
        found = set(content) if isinstance(content, dict) else set()
        if found != expected:
            raise ValueError(f"{path}: found the keys {sorted(found)}, expected {sorted(expected)}")
        spacing = content["spacing"]
        return cls(**{**content, "roi": tuple(content["roi"]), "spacing": tuple(spacing) if spacing else None})


class ViTSegmenter(nn.Module):
    """MONAI's ViT whose last tokens are upsampled by transposed convolutions, then a 1x1x1 head; no skip connections.

    Input (N, in_channels, *roi), output logits (N, out_channels, *roi). The patch size is a power of two: each step of
    ConvTranspose3d(2, stride 2), InstanceNorm3d and GELU doubles the resolution until it is that of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, roi: Sequence[int], sizes: Sizes) -> None:
        super().__init__()
        from monai.networks.nets import ViT

        patch, hidden, features = int(sizes["patch_size"]), int(sizes["hidden_size"]), int(sizes["features"])
        self.grid = tuple(length // patch for length in roi)
        self.vit = ViT(
            in_channels=in_channels, img_size=tuple(roi), patch_size=(patch,) * 3, hidden_size=hidden,
            mlp_dim=int(sizes["mlp_dim"]), num_layers=int(sizes["num_layers"]), num_heads=int(sizes["num_heads"]),
            dropout_rate=float(sizes["dropout_rate"]), classification=False, spatial_dims=3,
            qkv_bias=bool(sizes["qkv_bias"]),
        )  # fmt: skip
        steps = patch.bit_length() - 1
        widths = [hidden] + [features * 2 ** (steps - 1 - step) for step in range(steps)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths[1:], widths[:-1], strict=True):
            layers += [nn.ConvTranspose3d(wide, narrow, 2, stride=2), nn.InstanceNorm3d(narrow), nn.GELU()]
        self.decoder = nn.Sequential(*layers)
        self.out = nn.Conv3d(widths[-1], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, out_channels, *roi) of an image (N, in_channels, *roi)."""
        tokens, _ = self.vit(image)  # (N, number of patches, hidden)
        volume = tokens.transpose(1, 2).unflatten(2, self.grid)
        logits: Tensor = self.out(self.decoder(volume))
        return logits


def _unetr(in_channels: int, out_channels: int, roi: tuple[int, ...], sizes: Sizes) -> nn.Module:
    from monai.networks.nets import UNETR

    net: nn.Module = UNETR(in_channels, out_channels, img_size=roi, **sizes)
    return net


def _swinunetr(in_channels: int, out_channels: int, roi: tuple[int, ...], sizes: Sizes) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    del roi  # Swin windows are relative: one network serves every size that is a multiple of 32
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    net: nn.Module = SwinUNETR(in_channels, out_channels, **options)
    return net


# UNETR's decoder here is decoder5 to decoder2 and the output head: 2,678,562 parameters in the published size (feature
# size 16, hidden size 768), the 2.6785 M that the paper counts beside its cores. encoder1 to encoder4 stay frozen.
_SKIP_INPUTS = tuple(f"encoder1.layer.{name}.conv.weight" for name in ("conv1", "conv3"))
NETWORKS: dict[str, NetworkSpec] = {
    spec.name: spec
    for spec in (
        NetworkSpec(
            "vit", "ViT segmenter without skip connections", ViTSegmenter,
            {"patch_size": 4, "hidden_size": 128, "mlp_dim": 512, "num_layers": 6, "num_heads": 4, "features": 16,
             "dropout_rate": 0.0, "qkv_bias": False},
            head=("out.",), decoder=("decoder.", "out."), blocks="vit.blocks.", also_train="head", multiple=4,
            inputs=("vit.patch_embedding.patch_embeddings.weight",),
        ),
        NetworkSpec(
            "unetr", "MONAI's UNETR", _unetr,
            {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "dropout_rate": 0.0,
             "qkv_bias": False, "conv_block": True, "res_block": True},
            head=("out.",), decoder=("decoder2.", "decoder3.", "decoder4.", "decoder5.", "out."),
            blocks="vit.blocks.", also_train="decoder", multiple=16,
            inputs=("vit.patch_embedding.patch_embeddings.weight", *_SKIP_INPUTS),
        ),
        NetworkSpec(
            "swinunetr", "MONAI's SwinUNETR", _swinunetr,
            {"feature_size": 24, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "use_v2": False},
            head=("out.",), decoder=("decoder1.", "decoder2.", "decoder3.", "decoder4.", "decoder5.", "out."),
            blocks="swinViT.layers", also_train="decoder", multiple=32,
            inputs=("swinViT.patch_embed.proj.weight", *_SKIP_INPUTS),
        ),
        NetworkSpec(
            "dynunet", "MONAI's DynUNet", dynunet,
            {"filters": [16, 32, 64, 128], "strides": [1, 2, 2, 2], "kernel_size": [3, 3, 3, 3], "res_block": False},
            head=("output_block.",), decoder=("upsamples.", "output_block."), blocks="downsamples.",
            also_train="head", multiple=8,
            # The same layers have a second name in the state: the tree of skip connections.
            inputs=tuple(f"{tree}.{name}.conv.weight" for tree in ("input_block", "skip_layers.downsample")
                         for name in ("conv1", "conv3")),
            blocks_are="steps down",
        ),
        NetworkSpec(
            "segresnet", "MONAI's SegResNet", segresnet,
            {"init_filters": 16, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "dropout_prob": 0.0},
            head=("conv_final.2.",), decoder=("up_layers.", "up_samples.", "conv_final."), blocks="down_layers.",
            also_train="head", multiple=8, inputs=(FIRST["segresnet"],), blocks_are="steps down",
        ),
    )
}  # fmt: skip


def get_spec(name: str) -> NetworkSpec:
    """The architecture called `name`; ValueError lists the known ones."""
    if name not in NETWORKS:
        raise ValueError(f"network: found '{name}', expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def complete_sizes(spec: NetworkSpec, sizes: Sizes) -> dict[str, Any]:
    """The default sizes, overridden by `sizes`. ValueError for a size that the network does not have."""
    unknown = sorted(set(sizes) - set(spec.sizes))
    if unknown:
        raise ValueError(f"sizes of {spec.name}: found {', '.join(unknown)}, expected among {', '.join(spec.sizes)}")
    return {**spec.sizes, **sizes}


def check_network(config: NetworkConfig) -> dict[str, Any]:
    """The complete sizes of a configuration.

    Raises:
        ValueError: The network or a size is unknown, lists of sizes do not fit one another, or a side of the window is
            not a multiple of what it must be.
    """
    spec = get_spec(config.network)
    sizes = complete_sizes(spec, config.sizes)
    check_levels(sizes)
    multiple = window_multiple(sizes, spec.multiple)
    if "patch_size" in sizes and multiple & (multiple - 1):
        raise ValueError(f"sizes of {spec.name}: found patch_size {multiple}, expected a power of two")
    if any(length <= 0 or length % multiple for length in config.roi):
        raise ValueError(
            f"roi of {spec.name}: found {'x'.join(map(str, config.roi))}, expected positive multiples of {multiple}"
        )
    return sizes


def build_network(config: NetworkConfig, seed: int = 0) -> nn.Module:
    """A network with random weights drawn from `seed`; the global random state of PyTorch is left as it was.

    Raises:
        ValueError: Of :func:`check_network`.
    """
    require_package("monai")
    require_package("einops")
    sizes = check_network(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_spec(config.network).construct(config.in_channels, config.out_channels, config.roi, sizes)


def target_layers(model: nn.Module, but_for: Sequence[str] = ()) -> list[str]:
    """Names of the layers that tCUR adapts by default, for other methods that adapt the same layers.

    Args:
        model: The network.
        but_for: Prefixes of names that are left out: what trains whole needs no adapter.
    """
    return [target.name for target in find_targets(model, TCURConfig()) if not has_prefix(target.name, but_for)]


def has_prefix(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a parameter's name starts with one of the prefixes."""
    return name.startswith(tuple(prefixes))


@torch.no_grad()
def randomise(model: nn.Module, config: NetworkConfig, prefixes: Sequence[str], seed: int) -> None:
    """Initialise the parameters whose names start with one of the prefixes at random again, from `seed`."""
    fresh = dict(build_network(config, seed).named_parameters())
    for name, parameter in model.named_parameters():
        if has_prefix(name, prefixes):
            parameter.copy_(fresh[name])


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors, atomically."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state))


def _some(lines: list[str], limit: int = 3) -> str:
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], spec: NetworkSpec, source: Path) -> bool:
    """Load `tensors` into `model`. A head for another number of classes is left out and keeps its random weights.

    Prefixes that wrappers have put before the names go, as :func:`tcurlora_ext.io.tensors.match_names` says.

    Returns:
        Whether the head was left out.

    Raises:
        ValueError: Any other name, shape or kind of number differs, or a weight is NaN or infinite; the message lists
            them, and the model is left as it was.
    """
    state = model.state_dict()
    tensors = match_names(tensors, state)
    # MONAI up to 1.3 built cross-attention it never used; its own loader drops those tensors too
    tensors = {name: value for name, value in tensors.items() if name in state or ".cross_attn." not in name}
    head = [name for name in state if has_prefix(name, spec.head)]
    pairs = [(tensors[name].shape, state[name].shape) for name in head if name in tensors]
    replaced = any(len(a) != 0 and a[0] != b[0] for a, b in pairs) and all(a[1:] == b[1:] for a, b in pairs)
    kept = [name for name in state if not replaced or name not in head]
    missing = [f"{name} missing" for name in kept if name not in tensors]
    unknown = [f"{name} unknown" for name in tensors if name not in state]
    other = [
        f"{name} is {_kind(tensors[name])}, expected {_kind(state[name])}"
        for name in kept
        if name in tensors and not _same_kind(tensors[name], state[name])
    ]
    if missing or unknown or other:
        differences = "; ".join(_some(names) for names in (other, missing, unknown) if names)
        raise ValueError(f"{source}: weights do not fit the network {spec.name}: {differences}")
    used = {name: tensors[name].to(state[name].dtype) for name in kept}
    if broken := not_finite(used):
        raise ValueError(f"{source}: found NaN or infinite values in {_some(broken)}, expected finite weights")
    model.load_state_dict(state | used)
    return replaced


def _same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether shapes are equal and both are floating or neither: quantised weights have the shape of real ones."""
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")
