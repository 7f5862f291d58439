"""``tcurlora to-lora``: the adapter as a LoRA adapter in PEFT's file format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import file_size


def to_lora(
    source: options.Source,
    output: Annotated[Path, typer.Option(help="Folder to write: adapter_config.json and adapter_model.safetensors.")],
    max_rank: Annotated[int, typer.Option(help="The largest LoRA rank that is written.")] = 512,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="A file (.safetensors) for what was trained beside the cores, in place of modules_to_save, which PEFT "
            "cannot load by every name."
        ),
    ] = None,
    method: options.Method = None,
    seed: options.Seed = 0,
    model: options.BaseModel = None,
    kwargs: options.Kwargs = None,
    weights: options.Weights = None,
    subspace: options.SubspaceFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a LoRA adapter in the folder.")] = False,
) -> None:
    """Write the adapter as an exact LoRA adapter in PEFT's file format, which engines that serve LoRA read."""
    from tcurlora_ext.adapter.files.lora import CONFIG, WEIGHTS, to_lora
    from tcurlora_ext.cli.adapted import open_adapted

    if (output / CONFIG).exists() and not overwrite:
        raise ValueError(f"{output}: the folder has an {CONFIG}; expected a new folder, or --overwrite")
    if beside is not None and (beside.is_dir() or (beside.exists() and not overwrite)):
        raise ValueError(f"{beside}: it exists; expected the name of a new file, or of a file with --overwrite")
    adapted = open_adapted(source, method, seed, model, kwargs or {}, weights, subspace)
    network = adapted.require_adapter()
    to_lora(network, output, max_rank, beside=beside)
    config = json.loads((output / CONFIG).read_text())
    size = file_size((output / WEIGHTS).stat().st_size)
    typer.echo(f"{adapted.title}: LoRA adapter of rank {config['r']}, {size} written to {output}")
    if beside is not None:
        typer.echo(f"what was trained beside the cores, for the base to load first: {beside}")
    if config["modules_to_save"]:
        typer.echo(f"with the whole modules (modules_to_save) {', '.join(config['modules_to_save'])}")
