"""Adapt nnU-Net's PlainConvUNet to another contrast by tCUR, with its output layers, and load the adapter again.

    python examples/adapt_plainconvunet.py                        # a small network, nothing downloaded
    python examples/adapt_plainconvunet.py --steps 100 --rank 4

The network is first trained on synthetic volumes with two kinds of bright boxes, then adapted to volumes in which
these are dark. It prints the loss before and after adaptation of the output layers alone and of tCUR with them, and
that of the loaded adapter. Needs the package dynamic-network-architectures, which nnU-Net brings.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

try:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the package {error.name} is not installed; expected dynamic-network-architectures: "
        "pip install dynamic-network-architectures. MONAI's DynUNet is the same network for the command: "
        "tcurlora pretrain --network dynunet"
    ) from None

HEADS = "decoder.seg_layers"


def build() -> nn.Module:
    """PlainConvUNet as nnU-Net builds it, with 8 to 32 channels, for one contrast and three classes."""
    net: nn.Module = PlainConvUNet(
        1, 4, (8, 16, 32, 32), nn.Conv3d, 3, (1, 2, 2, 2), 2, 3, 2, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=False,
    )  # fmt: skip
    return net


def batch(generator: torch.Generator, sign: float) -> tuple[Tensor, Tensor]:
    """Two volumes (2, 1, 16, 16, 16) with a box of each class, brighter or darker than the noise, and their labels."""
    label = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    for sample in label:
        for kind in (1, 2):
            x, y, z = torch.randint(0, 10, (3,), generator=generator).tolist()
            sample[x : x + 6, y : y + 6, z : z + 6] = kind
    noise = 0.3 * torch.randn(2, 1, 16, 16, 16, generator=generator)
    return sign * label[:, None].float() + noise, label


def loss_of(net: nn.Module, sign: float, seed: int) -> Tensor:
    """Cross-entropy on a batch."""
    image, label = batch(torch.Generator().manual_seed(seed), sign)
    loss: Tensor = nn.functional.cross_entropy(net(image), label)
    return loss


def train(net: nn.Module, sign: float, steps: int, lr: float) -> nn.Module:
    """Train what requires gradients."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, sign, step).backward()
        optimizer.step()
    return net


@torch.no_grad()
def held_out(net: nn.Module) -> float:
    """Mean loss on four batches of dark boxes that are not trained on."""
    return sum(float(loss_of(net, -1.0, 10_000 + seed)) for seed in range(4)) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("plainconvunet.safetensors"))
    options = parser.parse_args()
    torch.manual_seed(0)
    base = train(build(), 1.0, options.pretrain_steps, 3e-3)
    print(f"before: loss {held_out(base):.3f}")

    heads = copy.deepcopy(base).requires_grad_(False)
    heads.get_submodule(HEADS).requires_grad_(True)
    print(f"output layers alone: loss {held_out(train(heads, -1.0, options.steps, 1e-2)):.3f}")

    adapted = tcur.inject(copy.deepcopy(base), tcur.TCURConfig(rank=options.rank))
    tcur.unfreeze(adapted, HEADS)
    print(tcur.summary(adapted))
    after = held_out(train(adapted, -1.0, options.steps, 1e-2))
    print(f"tCUR with output layers: loss {after:.3f}")
    tcur.save_adapter(adapted, options.output)
    loaded = tcur.load_adapter(copy.deepcopy(base), options.output)
    print(f"the same, loaded: loss {held_out(loaded):.3f}, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
