"""Methods compared on real hippocampus MRI: the network and data of bench/hippocampus.py, through `tcurlora compare`.

    python -m tcurlora_ext.bench.comparison WORK RESULTS --maps SYNTHSEG_MAPS --data HIPPOCAMPUS --name main \\
        --methods head,full,lora,tcur --shots 5_subjects_seed0 --seeds 5

The comparison is in WORK/comparison-NAME, with a run folder for each training set. A run folder that is there already
is taken over, and a comparison that was stopped goes on. Tests are over subjects: volumes 2k - 1 and 2k are the two
sides of one. With --choose each method's learning rate is searched first, on other subjects (bench/rates.py).
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
from tcurlora_ext.bench.learned import STEPS, hippocampus_setting, subject_of
from tcurlora_ext.bench.rates import chosen_rates, search_rates
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
    maps: Annotated[Path, typer.Option(help="SynthSeg's label maps.")],
    data: Annotated[Path, typer.Option(help="The real data.")],
    name: Annotated[str, typer.Option(help="Of the comparison.")] = "main",
    network: Annotated[str, typer.Option(help="Pretrained on the synthetic images.")] = "vit",
    methods: Annotated[str, typer.Option(help="Comma separated.")] = "head,full,lora,tcur",
    shots: Annotated[str, typer.Option(help="Numbers of subjects or lists of splits.json.")] = "5_subjects_seed0",
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = 5,
    steps: Annotated[int, typer.Option(help="Of adapting.")] = STEPS,
    tune: Annotated[bool, typer.Option("--tune", help="Search learning rates on folds of the training cases.")] = False,
    trials: Annotated[int, typer.Option(help="Of each method in the search.")] = 3,
    tune_over: Annotated[str, typer.Option(help="rank, alpha or both, beside the learning rate.")] = "",
    reference: Annotated[str, typer.Option(help="The method of the tests.")] = "lora",
    lr: Annotated[str, typer.Option(help='JSON, e.g. {"tcur": 3e-3}, beside 1e-3 of the head.')] = "{}",
    choose: Annotated[
        bool, typer.Option("--choose", help="Search rates on cases that the table does not have, and write rates.csv.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure steps side by side after the training.")] = False,
) -> None:
    """Compare methods on the hippocampus setting and copy the tables."""
    display = Display(Console(width=120))
    setting = hippocampus_setting(work, maps, data, display, network)
    out, published = work / f"comparison-{name}", results / f"comparison-{name}"
    names, rates = tuple(methods.split(",")), {**setting.lr, **json.loads(lr)}
    if choose:
        searched = search_rates(replace(setting, lr=rates), names, work / "rates" / network, steps, display)
        published.mkdir(parents=True, exist_ok=True)
        write_csv(published / "rates.csv", searched)
        rates |= chosen_rates(searched)
    subjects = subject_file(setting.target.folder / "images", work / "subjects.json")
    settings = CompareSettings(
        data=setting.target.folder, pretrained=setting.base, methods=names, seeds=seeds,
        steps=steps, lr=rates, val_list=setting.target.val,
        training_sets=tuple(shots.split(",")), reference=reference, subject_file=subjects,
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
