"""`tcurlora pretrain`: a segmentation network trained from random weights on a source data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.cli import training_options as training
from tcurlora_ext.io.table import terminal


def pretrain(
    ctx: typer.Context,
    run: training.Run = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for base.safetensors and network.json: new or empty.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data set, as for finetune. Default: the embedded source domain."),
    ] = None,
    network: Annotated[str, typer.Option(help="vit, unetr, swinunetr, dynunet or segresnet.")] = "vit",
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
    shots: options.Shots = None,
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
    amp: training.Amp = "off",
    cache: training.Cache = None,
    workers: training.Workers = 0,
    augment: training.Augment = "full",
    flips: training.Flips = False,
    class_weights: training.ClassWeights = None,
    accumulate: training.Accumulate = 1,
    select: training.Select = "last",
    patience: training.Patience = 0,
    select_fraction: training.SelectFraction = 0.2,
    select_every: training.SelectEvery = None,
    subject_pattern: training.SubjectPattern = None,
    log: training.Logs = None,
    config: training.Config = None,
    resume: training.Resume = False,
) -> None:
    """Train a segmentation network from random weights, as the base that `tcurlora finetune` adapts."""
    from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings
    from tcurlora_ext.segmentation.runs.pretraining import pretrain as start
    from tcurlora_ext.segmentation.runs.settings import read_settings
    from tcurlora_ext.segmentation.terminal import Display

    folder, from_there = training.run_folder(ctx, run, output, resume)
    settings = PretrainSettings(
        data=data, network=network, sizes=sizes or {}, roi=roi or (32, 32, 32), spacing=spacing,
        train_list=train_list, shots=shots, val_list=val_list, val_fraction=val_fraction, labels=labels, fold=fold,
        map_labels=map_labels, steps=steps, batch=batch, lr=lr, seed=seed, data_seed=data_seed,
        checkpoint_every=checkpoint_every, device=device, amp=amp, cache=cache, workers=workers,
        augment=augment, flips=flips, class_weights=class_weights, accumulate=accumulate, select=select,
        patience=patience, select_fraction=select_fraction, select_every=select_every, subject_pattern=subject_pattern,
        log=log or (),
    )  # fmt: skip
    if from_there:
        settings = training.resumed(read_settings(folder, "pretrain", PretrainSettings), settings, ctx)
    training.say_unused(ctx, settings)
    display = Display(terminal())
    with training.going_on("pretrain", folder):
        start(settings, folder, resume=resume, display=display)
    display.say(f"base: {folder / 'base.safetensors'}")
