"""`tcurlora evaluate`: scores of the methods of a run, or of label maps, on labelled cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import terminal


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder of finetune; left out where --predictions alone are scored.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data set with labels, as for finetune. Default: that of the run.")
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of label maps, named as the cases, to score too; may be repeated."),
    ] = None,
    case_list: Annotated[
        str | None,
        typer.Option(
            "--list",
            help="The list in splits.json to score, or all. Default: the run's validation cases, or all of other data.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="all, or some of the run's methods with commas between.")] = "all",
    seed: Annotated[str, typer.Option(help="all, or some of the run's seeds with commas between.")] = "all",
    labels: options.Labels = None,
    fold: Annotated[
        int | None, typer.Option(help="Score a fold of the data set: its list val, or with --list train the other.")
    ] = None,
    map_labels: Annotated[
        options.Mapping | None,
        typer.Option(
            parser=options.mapping,
            metavar="OLD=NEW,...",
            help="Values that stand for others in labels. Default: as in the run.",
        ),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Overlap of neighbouring windows, as a fraction of the window.")
    ] = 0.25,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for scores.csv and scores.json. Default: `evaluation` in the run's or first folder."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores that are there already.")] = False,
    device: options.Device = "auto",
) -> None:
    """Score label maps by Dice, HD95, surface Dice at 1 mm and volume error, and compare methods case by case."""
    from tcurlora_ext.segmentation.scoring.scorecard import EvaluateSettings
    from tcurlora_ext.segmentation.scoring.scorecard import evaluate as score
    from tcurlora_ext.segmentation.terminal import Display

    score(
        EvaluateSettings(
            run=run, data=data, predictions=tuple(predictions or ()), case_list=case_list, method=method, seed=seed,
            labels=labels, fold=fold, map_labels=map_labels, overlap=overlap, device=device,
        ),
        output, overwrite=overwrite, display=Display(terminal()),
    )  # fmt: skip
