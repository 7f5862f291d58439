"""`tcurlora pretrain`: a segmentation network trained from random weights on a source data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import terminal


def pretrain(
    output: Annotated[Path, typer.Option(help="Folder for base.safetensors and network.json: new or empty.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Data set, as for finetune. Default: the embedded source domain."),
    ] = None,
    network: Annotated[str, typer.Option(help="vit, unetr or swinunetr.")] = "vit",
    sizes: options.NetworkSizes = None,
    roi: Annotated[
        options.WholeTriple | None,
        typer.Option(
            parser=options.whole_triple,
            metavar="X,Y,Z",
            help="Window in voxels: one number or three. Default: 32.",
        ),
    ] = None,
    spacing: options.Spacing = None,
    train_list: options.TrainList = "train",
    val_list: options.ValList = "val",
    val_fraction: options.ValFraction = None,
    labels: options.Labels = None,
    fold: options.Fold = None,
    map_labels: options.MapLabels = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 450,
    batch: options.Batch = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the windows and their augmentation.")] = 0,
    data_seed: options.DataSeed = 0,
    checkpoint_every: options.CheckpointEvery = 50,
    device: options.Device = "auto",
    resume: options.Resume = False,
) -> None:
    """Train a segmentation network from random weights, as the base that `tcurlora finetune` adapts."""
    from tcurlora_ext.segmentation.pretraining import PretrainSettings
    from tcurlora_ext.segmentation.pretraining import pretrain as run
    from tcurlora_ext.segmentation.terminal import Display

    display = Display(terminal())
    run(
        PretrainSettings(
            data=data, network=network, sizes=sizes or {}, roi=roi or (32, 32, 32), spacing=spacing,
            train_list=train_list, val_list=val_list, val_fraction=val_fraction, labels=labels, fold=fold,
            map_labels=map_labels, steps=steps, batch=batch, lr=lr, seed=seed, data_seed=data_seed,
            checkpoint_every=checkpoint_every, device=device,
        ),
        output, resume=resume, display=display,
    )  # fmt: skip
    display.say(f"base: {output / 'base.safetensors'}")
