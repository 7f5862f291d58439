"""`tcurlora pretrain`: a segmentation network trained from nothing on a source data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli.options import console, floats, mapping, triple, words


def pretrain(
    output: Annotated[Path, typer.Option(help="Folder for base.safetensors and network.json; new or empty.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Data set in the Medical Decathlon layout; without it the embedded source domain."),
    ] = None,
    network: Annotated[str, typer.Option(help="vit, unetr or swinunetr.")] = "vit",
    sizes: Annotated[str, typer.Option(help="Sizes of the network as JSON, e.g. '{\"hidden_size\": 192}'.")] = "{}",
    roi: Annotated[str, typer.Option(help="Window in voxels: one number or three, X,Y,Z.")] = "32",
    spacing: Annotated[str | None, typer.Option(help="Resample to this voxel size in mm, one number or three.")] = None,
    train_list: Annotated[str, typer.Option(help="List of splits.json to train on.")] = "train",
    val_list: Annotated[str, typer.Option(help="List of splits.json to validate on.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Part held out at random where there is no splits.json.")] = 0.2,
    labels: Annotated[
        str | None,
        typer.Option(help="Class names, background first, comma separated, where dataset.json has none."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 450,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, windows and augmentation.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Seed of the embedded subjects and of a random split.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = False,
) -> None:
    """Train a segmentation network from random weights, as the base that `finetune` adapts."""
    from tcurlora_ext.segmentation.pretraining import PretrainSettings
    from tcurlora_ext.segmentation.pretraining import pretrain as run
    from tcurlora_ext.segmentation.terminal import Display

    display = Display(console())
    run(
        PretrainSettings(
            data=data, network=network, sizes=mapping("sizes", sizes), roi=triple("roi", roi),
            spacing=None if spacing is None else floats("spacing", spacing), train_list=train_list, val_list=val_list,
            val_fraction=val_fraction, labels=words(labels), steps=steps, batch=batch, lr=lr, seed=seed,
            data_seed=data_seed, checkpoint_every=checkpoint_every, device=device,
        ),
        output, resume=resume, display=display,
    )  # fmt: skip
    display.say(f"base: {output / 'base.safetensors'}")
