"""``tcurlora features``: which features an adapter chose, how stable the choice is, and what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import rich_table, terminal

if TYPE_CHECKING:
    from torch import nn

    from tcurlora_ext.segmentation.prediction.predictor import Run


def features(
    run: Annotated[Path, typer.Argument(help="Run folder of finetune.")],
    method: options.Method = None,
    seed: options.Seed = 0,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="A run of another base, whose choice by this method is compared; may be repeated."),
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="How many of the run's validation cases are predicted.")] = 4,
    stack: Annotated[list[str] | None, typer.Option(help="Only the stack of this name; may be repeated.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for tables and pictures. Default: features/ beside the adapter.")
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Show the chosen features, how far other seeds, ranks and bases choose them too, and what each of them does.

    Each feature's slot of the core is set to zero and the Dice that is lost measured, beside that without a random
    direction of the same core. A picture shows where chosen rows are active, beside random rows of the same weight.
    """
    from tcurlora_ext.adapter.model.structure import stacks
    from tcurlora_ext.cli.adapted import method_of_run
    from tcurlora_ext.io.records import write_csv
    from tcurlora_ext.segmentation.dataset import load_volumes
    from tcurlora_ext.segmentation.methods import folder_name
    from tcurlora_ext.segmentation.packages import require_package
    from tcurlora_ext.segmentation.prediction.predictor import choose_method, choose_seeds, load_predictor, open_run
    from tcurlora_ext.segmentation.runs.pretraining import pick_device
    from tcurlora_ext.segmentation.scoring.feature_pictures import draw_activity, draw_contributions
    from tcurlora_ext.segmentation.scoring.features import (
        activity,
        contributions,
        find_slots,
        most_changed,
        most_needed,
        patch_grid,
    )
    from tcurlora_ext.segmentation.scoring.scoring import find_cases
    from tcurlora_ext.segmentation.terminal import Display

    require_package("matplotlib")
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output}: found a file, expected a folder or nothing")
    opened = open_run(run)
    name, _ = choose_method(opened, method_of_run(run, method))
    choose_seeds(opened, name, [seed])
    predictor = load_predictor(run, name, [seed], pick_device(device))
    model, config = predictor.models[0], predictor.config
    if not stacks(model):
        raise ValueError(f"method: found {name}, which has no stacks, expected a tCUR method such as tcur")
    patch_grid(config)  # which refuses networks of other tokens
    found = find_slots(model, stack or ())
    compared = _overlaps(opened, name, seed, model, other or [])
    chosen = find_cases(None, opened).cases[:cases]
    volumes = load_volumes(chosen, config.spacing)
    labels = [label for value, label in predictor.labels.items() if value]
    display, folder = Display(terminal()), output or run / folder_name(name) / f"seed{seed}" / "features"
    _say_overlaps(compared, display)
    with display.bar(f"{len(found)} slots, each beside a control", 2 * len(found)) as on_step:
        rows = contributions(model, volumes, config, labels, found, seed=seed, on_step=on_step)
    drawn = stacks(model)[most_needed(rows, labels)]
    where = [activity(model, volume, config, drawn, most_changed(drawn), seed) for volume in volumes]
    active = [
        {"case": volume.name, "layer": one.layer, "kind": kind, "feature": feature, "separation": separation}
        for volume, one in zip(volumes, where, strict=True)
        for kind, feature, separation in zip(one.kinds, one.features, one.separation, strict=True)
    ]
    _say_contributions(rows, labels, display)
    _say_activity(active, display)
    for file, content in (("features.csv", rows), ("activations.csv", active), ("overlap.csv", compared)):
        if content:
            write_csv(folder / file, content)
    title = f"{name}, seed {seed}: {len(volumes)} validation cases"
    draw_contributions(folder / "contributions.png", rows, labels, title)
    spacing = config.spacing or volumes[0].spacing
    picture = f"{volumes[0].name}, input of {where[0].layer}"
    draw_activity(folder / "activations.png", volumes[0], where[0], spacing, picture)
    display.say(f"written to {folder}: features.csv, overlap.csv, activations.csv, contributions.png, activations.png")


def _overlaps(run: Run, method: str, seed: int, model: nn.Module, others: list[Path]) -> list[dict[str, Any]]:
    """The choice of a model beside those of the run's other seeds, of half and twice the rank, and of other runs."""
    from tcurlora_ext.segmentation.prediction.predictor import open_run
    from tcurlora_ext.segmentation.runs.network import load_adapted
    from tcurlora_ext.segmentation.scoring.features import choice_at, choice_of, overlap

    choices = {f"seed {n}": choice_of(load_adapted(run.folder, method, n)) for n in run.seeds[method] if n != seed}
    choices |= {f"{words} the rank": choice_at(model, factor) for words, factor in (("half", 0.5), ("twice", 2))}
    for folder in others:
        if method not in open_run(folder).seeds:
            raise ValueError(f"other: found no finished {method} in {folder}, expected one")
        choices[f"base of {folder}"] = choice_of(load_adapted(folder, method, open_run(folder).seeds[method][0]))
    own = choice_of(model)
    return [{"compared_with": name, **row} for name, choice in choices.items() for row in overlap(own, choice)]


def _say_overlaps(rows: list[dict[str, Any]], display: Any) -> None:
    """Means over stacks, a line for each comparison and side."""
    from tcurlora_ext.segmentation.metrics.evaluation import finite_mean

    lines = []
    for key in dict.fromkeys((row["compared_with"], row["side"]) for row in rows):
        own = [row for row in rows if (row["compared_with"], row["side"]) == key]
        means = [f"{finite_mean([row[name] for row in own]):.3f}" for name in ("jaccard", "random_jaccard")]
        lines.append([*key, f"{sum(row['shared'] for row in own)}/{sum(row['chosen'] for row in own)}", *means])
    if lines:
        display.console.print(rich_table(("compared with", "", "shared", "Jaccard", "if random"), lines, left=(0, 1)))


def _say_contributions(rows: list[dict[str, Any]], labels: list[str], display: Any) -> None:
    """The slots without which most Dice is lost, and the spread of chosen and random ones."""
    from tcurlora_ext.segmentation.metrics.evaluation import finite_mean

    def lost(row: dict[str, Any]) -> float:
        return 100 * finite_mean([row[f"lost {label}"] for label in labels])

    best = sorted((row for row in rows if row["kind"] == "chosen"), key=lost, reverse=True)[:8]
    display.console.print(rich_table(
        ("stack", "side", "feature", "norm rank", "share of U", "Dice lost"),
        [[row["stack"], row["side"], _feature(row), str(row["norm_rank"] or "-"), f"{row['share']:.1%}",
          f"{lost(row):+.2f}"] for row in best], left=(0, 1),
    ))  # fmt: skip
    for kind, words in (("chosen", "a chosen feature"), ("random", "a random direction of the core")):
        values = sorted(lost(row) for row in rows if row["kind"] == kind)
        display.say(
            f"points of Dice lost without {words}: {finite_mean(values):+.2f} on average, "
            f"{values[0]:+.2f} to {values[-1]:+.2f} (negative: won)"
        )


def _feature(row: dict[str, Any]) -> str:
    """The chosen feature of a slot; of learned factors, whose slots are directions, which of these."""
    return f"direction {row['slot']}" if row["feature"] is None else str(row["feature"])


def _say_activity(rows: list[dict[str, Any]], display: Any) -> None:
    """How well chosen and random rows tell foreground from background."""
    from tcurlora_ext.segmentation.metrics.evaluation import finite_mean

    means = {
        kind: finite_mean([row["separation"] for row in rows if row["kind"] == kind]) for kind in ("chosen", "random")
    }
    display.say(
        f"{rows[0]['layer']}: separation of foreground and background by chosen rows {means['chosen']:.2f} on average, "
        f"by random rows of the same weight {means['random']:.2f} (0.5: none, 1: complete)"
    )
