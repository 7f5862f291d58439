"""Adapt MONAI's UNETR to a few volumes of MSD Task04 (hippocampus) by tCUR; save the adapter and load it again.

    python examples/unetr_hippocampus.py --data Task04_Hippocampus               # imagesTr, labelsTr, dataset.json
    python examples/unetr_hippocampus.py --data Task04_Hippocampus --download    # downloads the data first
    python examples/unetr_hippocampus.py --data Task04_Hippocampus --weights UNETR.pt --hidden 768 --features 16

Without --weights, the script first pretrains a small UNETR on other training volumes of the same folder with inverted
contrast, which stands for a checkpoint from other images. It then adapts the network to --cases volumes without
inversion. It prints Dice on validation volumes before training, after training the decoder alone, after training tCUR
with the decoder, and after loading that adapter onto the same base. Needs the extra "segmentation".
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from monai import transforms
from monai.apps import DecathlonDataset, download_and_extract
from monai.data import CacheDataset, DataLoader, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNETR
from monai.utils import set_determinism
from rich.console import Console
from rich.table import Table
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.dataset import Case, read_dataset
from tcurlora_ext.segmentation.networks import get_spec, load_weights, read_weights, save_weights

TASK = "Task04_Hippocampus"
SPACING = (2.0, 2.0, 2.0)  # mm, to which volumes and labels are resampled; the data have 1 mm
ROI = (32, 32, 32)  # the network's input size in voxels: multiples of UNETR's patch size, 16
KEYS = ["image", "label"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loader(cases: Sequence[Case], batch: int, training: bool, inverted: bool = False) -> DataLoader:
    """Normalised volumes in memory; for training also cropped to ROI, rotated and scaled at random."""
    steps = [
        transforms.LoadImaged(KEYS),
        transforms.EnsureChannelFirstd(KEYS),
        transforms.Orientationd(KEYS, "RAS", labels=None),
        transforms.Spacingd(KEYS, SPACING, mode=("bilinear", "nearest")),
        transforms.ScaleIntensityRangePercentilesd("image", 0.5, 99.5, b_min=0.0, b_max=1.0, clip=True),
    ]
    if inverted:
        steps.append(transforms.ScaleIntensityd("image", minv=1.0, maxv=0.0))
    steps.append(transforms.NormalizeIntensityd("image"))
    if training:
        affine = {"rotate_range": (0.2,) * 3, "scale_range": (0.1,) * 3, "padding_mode": "border"}
        steps += [
            transforms.SpatialPadd(KEYS, ROI),
            transforms.RandSpatialCropd(KEYS, ROI, random_size=False),
            transforms.RandAffined(KEYS, prob=0.5, mode=("bilinear", "nearest"), **affine),
            transforms.RandScaleIntensityd("image", factors=0.2, prob=0.5),
        ]
    files = [{"image": str(case.image), "label": str(case.label)} for case in cases]
    return DataLoader(
        CacheDataset(files, transforms.Compose(steps), progress=False), batch_size=batch, shuffle=training
    )


def train(model: nn.Module, data: DataLoader, steps: int, rate: float) -> nn.Module:
    """Train the parameters that require a gradient by AdamW, on Dice and cross-entropy loss."""
    set_determinism(0)
    data.dataset.transform.set_random_state(0)  # the same augmentation for every method
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(data)), steps), start=1):
        loss = loss_of(model(batch["image"].to(DEVICE)), batch["label"].to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def dice(model: nn.Module, data: DataLoader, classes: int) -> str:
    """Mean Dice over volumes and foreground classes in per cent."""
    metric = DiceMetric(include_background=False)
    predicted = transforms.AsDiscrete(argmax=True, to_onehot=classes)
    true = transforms.AsDiscrete(to_onehot=classes)
    model.eval()
    for batch in data:
        logits = sliding_window_inference(batch["image"].to(DEVICE), ROI, 4, model)
        labels = decollate_batch(batch["label"].to(DEVICE))
        metric([predicted(one) for one in decollate_batch(logits)], [true(one) for one in labels])
    return f"{100 * metric.aggregate().item():.2f}"


def trained_parameters(model: nn.Module) -> str:
    """The number of trained parameters, as text."""
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"


def main() -> None:
    """Prepare the data and the base network, adapt, save, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an MSD task's folder, or images, labels, splits.json")
    parser.add_argument("--download", action="store_true", help=f"download {TASK} into the parent of --data")
    parser.add_argument("--weights", type=Path, help="state dict of a UNETR with the sizes below (.pt, .safetensors)")
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of the 12 heads")
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/unetr"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--unfreeze", default="decoder,out", help="what trains besides the cores: prefixes of names")
    parser.add_argument("--cases", type=int, default=5, help="volumes to adapt to")
    parser.add_argument("--val-cases", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pretrain-cases", type=int, default=60)
    parser.add_argument("--pretrain-steps", type=int, default=240)
    options = parser.parse_args()
    prefixes = options.unfreeze.split(",")
    if options.download:
        folder = options.data.parent
        download_and_extract(
            DecathlonDataset.resource[TASK], folder / f"{TASK}.tar", folder, DecathlonDataset.md5[TASK]
        )
    set_determinism(0)
    try:
        dataset = read_dataset(options.data)  # checks every file; splits at random where there is no splits.json
        if options.cases >= len(dataset.train):
            raise ValueError(f"--cases: found {options.cases}, expected fewer than {len(dataset.train)} for training")
        classes, sizes = len(dataset.labels), {"hidden_size": options.hidden, "mlp_dim": 4 * options.hidden}
        base = UNETR(dataset.channels, classes, ROI, feature_size=options.features, **sizes).to(DEVICE)
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name, _ in base.named_parameters()):
                raise ValueError(f"--unfreeze: found '{prefix}', expected the beginning of a parameter's name")
        if options.weights is not None:  # without the head where it has another number of classes
            load_weights(base, read_weights(options.weights), get_spec("unetr"), options.weights)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    few, others = dataset.train[: options.cases], dataset.train[options.cases :][: options.pretrain_cases]
    if options.weights is None:
        print(f"pretraining a small UNETR on {len(others)} volumes of inverted contrast")
        train(base, loader(others, options.batch, training=True, inverted=True), options.pretrain_steps, 3e-3)
        inverted = loader(dataset.val[: options.val_cases], 1, training=False, inverted=True)
        print(f"Dice on inverted validation volumes: {dice(base, inverted, classes)} %")
        save_weights(base, options.output / "base.safetensors")
    training = loader(few, options.batch, training=True)
    validation = loader(dataset.val[: options.val_cases], 1, training=False)
    table = Table("", "trained parameters", "Dice, %")
    table.add_row("before", "0", dice(base, validation, classes))

    print(f"training {options.unfreeze} alone on {len(few)} volumes")
    alone = copy.deepcopy(base).requires_grad_(False)
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
    train(alone, training, options.steps, options.rate)
    table.add_row(f"{options.unfreeze} alone", trained_parameters(alone), dice(alone, validation, classes))

    print(f"training tCUR with {options.unfreeze}")
    model = tcur.inject(copy.deepcopy(base), tcur.TCURConfig(rank=options.rank))
    tcur.unfreeze(model, prefixes)
    train(model, training, options.steps, options.rate)
    table.add_row(f"tCUR with {options.unfreeze}", trained_parameters(model), dice(model, validation, classes))

    tcur.save_adapter(model, options.output / "adapter.safetensors")  # cores, indices and what was unfrozen
    loaded = tcur.load_adapter(copy.deepcopy(base), options.output / "adapter.safetensors")
    table.add_row("the same, loaded", "", dice(loaded, validation, classes))
    Console().print(table)
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
