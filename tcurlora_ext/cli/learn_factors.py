"""`tcurlora learn-factors`: a subspace for a family of tasks, over which adapters are their cores alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import terminal


def learn_factors(
    data: Annotated[
        list[Path], typer.Option(help="Data set, as for finetune: cases of the family. Several take turns.")
    ],
    pretrained: Annotated[Path, typer.Option(help="Weights that the adapters will be for, as for finetune.")],
    output: Annotated[Path, typer.Option(help="The file of the subspace.")],
    rank: Annotated[int, typer.Option(help="Directions of every layer; an adapter may use fewer.")] = 8,
    coupled: Annotated[
        bool, typer.Option("--coupled", help="One core for all layers of a shape, as the paper's stacks.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of training whole weights, which are put back.")] = 240,
    batch: options.Batch = 2,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    bits: Annotated[int, typer.Option(help="Bits of an entry of the directions: 1, 2, 4, 8, 16 or 32.")] = 2,
    also_train: options.AlsoTrain = None,
    network: options.PretrainedNetwork = None,
    sizes: options.NetworkSizes = None,
    roi: options.Window = None,
    spacing: options.Spacing = None,
    train_list: options.TrainList = "train",
    val_list: options.ValList = "val",
    val_fraction: options.ValFraction = None,
    labels: options.Labels = None,
    fold: options.Fold = None,
    map_labels: options.MapLabels = None,
    seed: Annotated[int, typer.Option(help="Seed of the windows and of a new head.")] = 0,
    data_seed: options.DataSeed = 0,
    device: options.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
) -> None:
    """Learn on some cases of a family in which directions an adapter for other cases of it should move the weights.

    `tcurlora finetune --factors FILE` then trains a few hundred parameters for each new task over them.
    """
    import tcurlora_ext as tcur
    from tcurlora_ext.segmentation.runs.learning import LearnSettings, learn
    from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
    from tcurlora_ext.segmentation.terminal import Display

    if output.exists() and not overwrite:  # adapters of its cores alone need the subspace that is in it
        raise ValueError(f"{output}: the file exists; expected a new one, or --overwrite")
    coupling = {"stack_by": "shape", "transform": "dft"} if coupled else {}
    base = FinetuneSettings(
        data=data[0], pretrained=pretrained, also_train=also_train, batch=batch, network=network, sizes=sizes or {},
        roi=roi, spacing=spacing, train_list=train_list, val_list=val_list, val_fraction=val_fraction, labels=labels,
        fold=fold, map_labels=map_labels, data_seed=data_seed, device=device,
    )  # fmt: skip
    config = tcur.TCURConfig.preset("learned", rank=rank, **coupling)
    try:
        learn(LearnSettings(base, config, steps, lr, bits, seed, tuple(data[1:])), output, Display(terminal()))
    except KeyboardInterrupt:  # the file is written last, whole or not at all
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
