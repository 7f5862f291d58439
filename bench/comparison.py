"""Methods compared through `tcurlora compare`, on real hippocampus MRI or on the embedded brains.

    python -m tcurlora_ext.bench.comparison WORK RESULTS --maps SYNTHSEG_MAPS --data HIPPOCAMPUS --name main \\
        --methods head,full,lora,tcur --seeds 5
    python -m tcurlora_ext.bench.comparison WORK RESULTS --network dynunet --name embedded-dynunet

Networks and data are those of the two settings in bench/learned.py. The comparison is in WORK/comparison-NAME, with a
run folder for each training set. A run folder that is there already is taken over, and a comparison that was stopped
goes on. Tests are over subjects: volumes 2k - 1 and 2k of the hippocampus are the two sides of one. With --choose each
method's learning rate is searched first, on other subjects (bench/rates.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tcurlora_ext.bench.entry import run_command
from tcurlora_ext.bench.hippocampus import copy_results
from tcurlora_ext.bench.learned import STEPS, embedded_setting, hippocampus_setting, subject_of
from tcurlora_ext.bench.rates import FACTORS, chosen_rates, search_rates
from tcurlora_ext.io.records import read_csv, write_csv, write_json
from tcurlora_ext.segmentation.comparing.comparing import compare
from tcurlora_ext.segmentation.comparing.settings import CompareSettings
from tcurlora_ext.segmentation.metrics.comparison import ALL as MEAN
from tcurlora_ext.segmentation.terminal import Display

TABLES = ("table.csv", "cases.csv", "tests.csv")
DIFFERENCE = ("subjects", "difference", "low", "high", "p_holm")  # of tests.csv, in summary.csv


def subject_file(images: Path, path: Path) -> Path:
    """Write the subject of each volume in a folder, whose names end in numbers, to a file; returns that."""
    names = sorted(image.name.partition(".")[0] for image in images.iterdir())
    write_json(path, {name: str(subject_of(name.rpartition("_")[2])) for name in names})
    return path


def comparison(
    work: Annotated[Path, typer.Argument(metavar="WORK", help="Folder for data, the pretrained network and runs.")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Gets the folder comparison-NAME.")],
    maps: Annotated[Path | None, typer.Option(help="SynthSeg's label maps, for hippocampus.")] = None,
    data: Annotated[Path | None, typer.Option(help="The real data, for hippocampus.")] = None,
    name: Annotated[str, typer.Option(help="Of the comparison.")] = "main",
    network: Annotated[str, typer.Option(help="Pretrained on the source domain.")] = "vit",
    methods: Annotated[str, typer.Option(help="Comma separated.")] = "head,full,lora,tcur",
    shots: Annotated[
        str, typer.Option(help="Numbers of subjects or lists of splits.json. Default: the setting's training list.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = 5,
    steps: Annotated[int, typer.Option(help="Of adapting.")] = STEPS,
    tune: Annotated[bool, typer.Option("--tune", help="Search learning rates on folds of the training cases.")] = False,
    trials: Annotated[int, typer.Option(help="Of each method in the search.")] = 3,
    tune_over: Annotated[str, typer.Option(help="rank, alpha or both, beside the learning rate.")] = "",
    reference: Annotated[str, typer.Option(help="The method of the tests.")] = "lora",
    lr: Annotated[str, typer.Option(help='JSON, e.g. {"tcur": 3e-3}, beside 1e-3 of the head on hippocampus.')] = "{}",
    choose: Annotated[
        bool, typer.Option("--choose", help="Search rates on cases that the table does not have, and write rates.csv.")
    ] = False,
    factors: Annotated[
        str, typer.Option(help="Trials of --choose: multiples of a method's default rate. Default: 1/3, 1 and 3.")
    ] = "",
    measure: Annotated[bool, typer.Option("--measure", help="Measure steps side by side after the training.")] = False,
) -> None:
    """Compare methods on real hippocampus MRI, or without --maps and --data on the embedded brains; copy the tables."""
    display = Display(Console(width=120))
    if (maps is None) != (data is None):
        raise ValueError("maps, data: expected both for hippocampus, or neither for the embedded brains")
    if maps is None or data is None:
        setting, subjects = embedded_setting(work, display, network), None
    else:
        setting = hippocampus_setting(work, maps, data, display, network)
        subjects = subject_file(setting.target.folder / "images", work / "subjects.json")
    out, published = work / f"comparison-{name}", results / f"comparison-{name}"
    names, rates = tuple(methods.split(",")), {**setting.lr, **json.loads(lr)}
    if choose:
        trials_at = [float(factor) for factor in factors.split(",")] if factors else FACTORS
        searched = search_rates(replace(setting, lr=rates), names, work / "rates" / network, steps, display, trials_at)
        published.mkdir(parents=True, exist_ok=True)
        write_csv(published / "rates.csv", searched)
        rates |= chosen_rates(searched)
    settings = CompareSettings(
        data=setting.target.folder, pretrained=setting.base, methods=names, seeds=seeds,
        steps=steps, lr=rates, val_list=setting.target.val,
        training_sets=tuple((shots or setting.target.train).split(",")), reference=reference, subject_file=subjects,
        tune=tune, trials=trials, tune_over=tuple(word for word in tune_over.split(",") if word), measure=measure,
    )  # fmt: skip
    compare(settings, out, display=display)
    measured = ("steps.csv",) if (out / "steps.csv").is_file() else ()
    copy_results(out, published, (*TABLES, *measured))
    write_csv(published / "summary.csv", summary(out))


def summary(out: Path) -> list[dict[str, str]]:
    """The rows of table.csv that are means over labels, each with its difference in Dice to the reference.

    Args:
        out: The folder of a comparison.
    """
    tests = {
        (row["training_set"], row["method"]): row for row in read_csv(out / "tests.csv") if row["measure"] == "dice"
    }
    return [
        row | {name: tests.get((row["training_set"], row["method"]), {}).get(name, "") for name in DIFFERENCE}
        for row in read_csv(out / "table.csv")
        if row["label"] == MEAN
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(comparison, arguments, "python -m tcurlora_ext.bench.comparison")


if __name__ == "__main__":
    sys.exit(main())
