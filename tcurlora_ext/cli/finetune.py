"""`tcurlora finetune`: a pretrained segmentation network adapted by several methods, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.cli import training_options as training
from tcurlora_ext.io.table import terminal

Settings = TypeVar("Settings", bound=Any)
METHODS_HELP = (
    "all (head, decoder, full, lora, tcur, tcur-learned), or some of these and of tcur-light, tcur-carried, norms, "
    "bitfit, ssf, adapter, adalora, pissa, dora, vera, psoft, unilora, lora-xs, lora-sb, lora-pt, hyps, cps, curlora "
    "with commas between; options of a method follow its name, as in lora:rank=1."
)


def finetune(
    ctx: typer.Context,
    run: training.Run = None,
    output: Annotated[
        Path, typer.Option(help="Run folder: new or empty, or with --resume that of an interrupted run.")
    ] = Path("runs/finetune"),
    data: Annotated[
        Path | None,
        typer.Option(
            help="Data set: a folder (Medical Decathlon, nnU-Net, images and labels) or a data list of MONAI (.json). "
            "Default: the embedded target domain."
        ),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            help="Weights to adapt: .safetensors, a torch checkpoint, of which only tensors are read, or the folder of "
            "a MONAI bundle."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help=METHODS_HELP),
    ] = "all",
    seeds: Annotated[int, typer.Option(help="How many seeds: every method runs with each of 0 .. SEEDS-1.")] = 1,
    also_train: options.AlsoTrain = None,
    rank: Annotated[int, typer.Option(help="Tubal rank of tCUR.")] = 8,
    alpha: Annotated[float, typer.Option(help="Factor on tCUR's default scale.")] = 4.0,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.")] = 120,
    batch: options.Batch = 2,
    lr: Annotated[
        Any,
        typer.Option(
            parser=options.learning_rates,
            metavar="RATES",
            help="Peak learning rate: one number, or tcur=1e-2,head=3e-2. Default: each method's own.",
        ),
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="A subspace by learn-factors: also runs tcur-carried, which adapts over it.")
    ] = None,
    network: options.PretrainedNetwork = None,
    sizes: options.NetworkSizes = None,
    roi: options.Window = None,
    spacing: options.Spacing = None,
    train_list: options.TrainList = "train",
    shots: options.Shots = None,
    val_list: options.ValList = "val",
    val_fraction: options.ValFraction = None,
    labels: options.Labels = None,
    fold: options.Fold = None,
    map_labels: options.MapLabels = None,
    pretrain_steps: Annotated[
        int, typer.Option(help="Optimizer steps of pretraining on the embedded source domain.")
    ] = 450,
    data_seed: options.DataSeed = 0,
    checkpoint_every: options.CheckpointEvery = 25,
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
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First search each method's learning rate on folds of the training cases."),
    ] = False,
    trials: Annotated[int, typer.Option(help="Candidates of each method in the search.")] = 3,
    tune_over: Annotated[
        options.Words | None,
        typer.Option(parser=options.words, metavar="NAMES", help="Search rank and alpha too: rank, alpha or both."),
    ] = None,
    tune_folds: Annotated[int, typer.Option(help="In how many folds the training cases are divided for it.")] = 3,
    config: training.Config = None,
    resume: training.Resume = False,
) -> None:
    """Adapt a pretrained UNETR, SwinUNETR or ViT segmenter to a data set by several methods and compare them.

    Ends with a table of scores and trained parameters, and a report.html that needs no other file.
    """
    given = dict(locals())  # the options by their names
    from tcurlora_ext.segmentation.runs.finetuning import finetune as start
    from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, read_settings
    from tcurlora_ext.segmentation.terminal import Display

    folder, from_there = training.run_folder(ctx, run, output, resume)
    earlier = read_settings(folder, "finetune", FinetuneSettings) if from_there else None
    settings = settings_of(FinetuneSettings, given, method_names(method, factors), earlier)
    if earlier is not None:
        settings = training.resumed(earlier, settings, ctx, {"methods": "method"})
    training.say_unused(ctx, settings)
    with training.going_on("finetune", folder):
        start(settings, folder, resume=resume, display=Display(terminal()))


def settings_of(kind: type[Settings], given: Mapping[str, Any], names: Sequence[str], earlier: Any) -> Settings:
    """The settings that options give; an option that is None leaves the default.

    Args:
        kind: FinetuneSettings or a class that has more.
        given: The options by the names of the settings; others are left out.
        names: Of the methods.
        earlier: The settings of the run that goes on, where there is one.
    """
    lr = given["lr"]
    if isinstance(lr, float):  # one number is for all methods
        own = {name.partition(":")[0]: lr for name in (*(() if earlier is None else earlier.methods), *names)}
    else:
        own = lr or {}
    values = {field.name: given[field.name] for field in fields(kind) if given.get(field.name) is not None}
    return kind(**values | {"methods": tuple(names), "lr": own})


def method_names(method: str, factors: Path | None) -> tuple[str, ...]:
    """The methods by name, with the one that takes the factors where there are some."""
    from tcurlora_ext.segmentation.methods import STANDARD

    names: tuple[str, ...] = STANDARD if method == "all" else options.words(method)
    if factors is not None and not any(name.startswith("tcur-carried") for name in names):
        return (*names, "tcur-carried")
    return names
