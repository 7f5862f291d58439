"""`tcurlora finetune`: a pretrained segmentation network adapted by several methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli.options import console, floats, mapping, rates, triple, words


def finetune(
    output: Annotated[Path, typer.Option(help="Run folder; new or empty, or one to --resume.")] = Path("runs/finetune"),
    data: Annotated[
        Path | None,
        typer.Option(help="Data set in the Medical Decathlon layout; without it the embedded target domain."),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(help="Weights to adapt: .safetensors, or a torch checkpoint (never unpickled)."),
    ] = None,
    method: Annotated[str, typer.Option(help="tcur, lora, head, decoder, full: some with commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Runs each method with the seeds 0 .. SEEDS-1.")] = 1,
    also_train: Annotated[
        str | None,
        typer.Option(help="Trained beside an adapter: head or decoder. Default: head for vit, else decoder."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Tubal rank of tCUR.")] = 8,
    alpha: Annotated[float, typer.Option(help="Multiplies tCUR's scale rule.")] = 4.0,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.")] = 120,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 2,
    lr: Annotated[
        str | None,
        typer.Option(help="Peak learning rate: one number, or tcur=1e-2,head=3e-2. Default: per method."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="vit, unetr or swinunetr, where no network.json is beside --pretrained."),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Sizes of the network as JSON, e.g. '{\"hidden_size\": 192}'.")] = "{}",
    roi: Annotated[str | None, typer.Option(help="Window in voxels: one number or three, X,Y,Z.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Resample to this voxel size in mm, one number or three.")] = None,
    train_list: Annotated[str, typer.Option(help="List of splits.json to train on.")] = "train",
    val_list: Annotated[str, typer.Option(help="List of splits.json to validate on.")] = "val",
    val_fraction: Annotated[float, typer.Option(help="Part held out at random where there is no splits.json.")] = 0.2,
    labels: Annotated[
        str | None,
        typer.Option(help="Class names, background first, comma separated, where dataset.json has none."),
    ] = None,
    pretrain_steps: Annotated[int, typer.Option(help="Steps of pretraining on the embedded source domain.")] = 450,
    data_seed: Annotated[int, typer.Option(help="Seed of the embedded subjects and of a random split.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 25,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = False,
) -> None:
    """Adapt a pretrained UNETR, SwinUNETR or plain ViT segmenter to a data set; ends with a table and a report."""
    from tcurlora_ext.segmentation.methods import METHODS
    from tcurlora_ext.segmentation.run import FinetuneSettings
    from tcurlora_ext.segmentation.run import finetune as run
    from tcurlora_ext.segmentation.terminal import Display

    names = tuple(METHODS) if method == "all" else words(method) or ()
    run(
        FinetuneSettings(
            data=data, pretrained=pretrained, methods=names, seeds=seeds, also_train=also_train, rank=rank, alpha=alpha,
            lora_rank=lora_rank, steps=steps, batch=batch, lr=rates(lr, names), network=network,
            sizes=mapping("sizes", sizes), roi=None if roi is None else triple("roi", roi),
            spacing=None if spacing is None else floats("spacing", spacing), train_list=train_list, val_list=val_list,
            val_fraction=val_fraction, labels=words(labels), pretrain_steps=pretrain_steps, data_seed=data_seed,
            checkpoint_every=checkpoint_every, device=device,
        ),
        output, resume=resume, display=Display(console()),
    )  # fmt: skip
