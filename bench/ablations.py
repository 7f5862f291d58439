"""Which parts of the adapter matter: one option changed at a time, on hippocampus MRI from five subjects.

The network, the data and the steps are those of the hippocampus in bench/learned.py. The base setting is ``tcur``: the
paper's stacks at rank 8. Each group changes one thing of it, or of learned factors, and has a run folder of its own in
WORK/ablations.

    python -m tcurlora_ext.bench.ablations WORK RESULTS --maps SYNTHSEG_MAPS --data HIPPOCAMPUS

Groups run in the order of this file, the ones that the paper leaves open first; after each, RESULTS has what is
finished. A run that was stopped resumes when it is started again.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.bench.entry import run_command
from tcurlora_ext.bench.hippocampus import publish
from tcurlora_ext.bench.learned import (
    OTHER_STEPS,
    PARTS,
    STEPS,
    Cases,
    Setting,
    hippocampus_setting,
    part_of,
    run_methods,
    settings_of,
)
from tcurlora_ext.bench.reading.methods import RIVAL
from tcurlora_ext.io.records import read_csv, read_json, write_csv, write_json
from tcurlora_ext.segmentation.methods import get_methods
from tcurlora_ext.segmentation.metrics.comparison import interval
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean
from tcurlora_ext.segmentation.runs.learning import LearnSettings, learn
from tcurlora_ext.segmentation.terminal import Display

BASE = "tcur"
CaseDice = dict[tuple[str, str, int], dict[str, float]]  # (group, method, seed) -> case -> Dice
LEARNED, CARRIED = "tcur-learned", "tcur-carried:factors={}"


@dataclass(frozen=True)
class Group:
    """Methods that differ from a base setting in one thing.

    Attributes:
        folder: Of its run, and its word for ``--only``.
        varied: What differs, in words.
        methods: Their names with options. ``{}`` stands for the folder of subspaces.
        base: What they are compared with; one of their own, or of the first group.
        also_train: What trains beside the adapters.
    """

    folder: str
    varied: str
    methods: tuple[str, ...]
    base: str = BASE
    also_train: str | None = None

    @property
    def base_folder(self) -> str:
        """The folder of the run that has the base."""
        return GROUPS[0].folder if self.base == BASE else self.folder

    @classmethod
    def of(cls, folder: str, varied: str, **options: Sequence[Any]) -> Group:
        """The base setting with each of these values in turn, of one option after another."""
        return cls(folder, varied, tuple(f"{BASE}:{name}={v}" for name, values in options.items() for v in values))


GROUPS = (
    Group("base", "base setting", ("head", BASE)),
    Group.of("selection", "selection of rows and columns", selection=(
        "uniform", "leverage", "norm-sampled", "inverse-norm", "deim", "activation")),
    Group.of("rank", "rank", rank=(1, 2, 4, 16, 32)),
    Group.of("grouping", "layers of a stack", stack_by=("none", "role"), stack_blocks=(1, 3)),
    Group.of("orthonormal", "QR of columns and rows", orthonormal=("true",)),
    Group.of("scale", "scale", scale=(1.0,), alpha=(1, 2, 8), rank_stabilised=("true",)),
    Group.of("transform", "transform", transform=("identity", "dct")),
    Group.of("domain", "domain of the core", core_domain=("slice",)),
    Group.of("frequencies", "lowest frequencies alone", frequencies=(1, 2, 4)),
    Group.of("order", "order of the slices", order=("random", "role")),
    Group.of("norms", "norms trained too", norms=("true",)),
    Group("decoder", "decoder trained too", ("decoder", BASE, RIVAL), also_train="decoder"),
    Group.of("trainable", "C and R trained too", trainable=("all",)),
    Group("learned", "learned factors", (LEARNED, *(f"{LEARNED}:warm_up={steps}" for steps in (30, 60)),
                                         *(f"{LEARNED}:bits={bits}" for bits in (1, 32))), LEARNED),
    Group("carried", "factors learned on", tuple(
        CARRIED.format(f"{{}}/{name}.safetensors") for name in ("others", "five", "anterior", "synthetic")
    ), CARRIED.format("others")),
)  # fmt: skip


def learn_subspaces(setting: Setting, data: Path, work: Path, folder: Path, steps: int, display: Display) -> None:
    """Learn what the group "carried" takes: on 16 other subjects, five others, one label, and synthetic images."""
    part = "anterior"
    cases = {
        "others": setting.others, "five": setting.choice,
        part: replace(setting.others, folder=part_of(data, work / part, PARTS[part], setting)),
        "synthetic": Cases(work / "source", "train", "val"),
    }  # fmt: skip
    for name, of in cases.items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            on = settings_of(setting, of, (RIVAL,), 1, steps)
            learn(LearnSettings(on, TCURConfig.preset("learned"), steps), path, display)


def run_group(group: Group, methods: Sequence[str], setting: Setting, run: Path, seeds: int, steps: int,
              display: Display) -> None:  # fmt: skip
    """Run methods of a group in its folder, or go on with those that are in it."""
    settings = settings_of(setting, setting.target, methods, seeds, steps)
    run_methods(replace(settings, also_train=group.also_train), run, display)


def collect(work: Path, results: Path) -> list[dict[str, Any]]:
    """Write summary.csv, metrics.csv and run.json of all that is finished to RESULTS.

    Args:
        work: The folder of the groups' runs.
        results: Of the files.

    Returns:
        The rows of summary.csv: a method of a group, its Dice, and its difference to the group's base: the mean, its
        standard deviation over seeds, and the 95 % bootstrap interval over cases, whose values are means over seeds;
        of the seeds that both have.
    """
    metrics: list[dict[str, Any]] = []
    cases: CaseDice = {}
    for group in GROUPS:
        for method in get_methods([name.format(work) for name in group.methods]):
            for path in sorted((work / group.folder / method.folder).glob("seed*/result.json")):
                metrics.append({"group": group.folder, **read_json(path)})
                cases[group.folder, method.name, metrics[-1]["seed"]] = _case_dice(path.with_name("cases.csv"))
    head = next((row["trained_numbers"] for row in metrics if row["method"] == "head"), 0)
    summary = [
        _summary(group, name, metrics, cases, head)
        for group in GROUPS
        for name in dict.fromkeys(row["method"] for row in metrics if row["group"] == group.folder)
    ]
    publish(work / GROUPS[0].folder, results)
    write_csv(results / "metrics.csv", metrics)
    write_csv(results / "summary.csv", summary)
    ran = {group.folder: [row["method"] for row in summary if row["group"] == group.folder] for group in GROUPS}
    write_json(results / "run.json", {**read_json(results / "run.json"), "groups": ran})
    return summary


def _case_dice(path: Path) -> dict[str, float]:
    """The Dice of each case, as the mean over its labels."""
    return {
        row["case"]: finite_mean([float(value) for name, value in row.items() if name.startswith("dice ")])
        for row in read_csv(path)
    }


def _summary(
    group: Group, name: str, metrics: list[dict[str, Any]], cases: CaseDice, head: int
) -> dict[str, Any]:  # fmt: skip
    """The row of a method; its differences are empty where it is the base or the base is not finished."""
    runs = _runs(metrics, group.folder, name)
    base = _runs(metrics, group.base_folder, group.base)
    dice = [run["dice"] for run in runs.values()]
    row = {
        "group": group.folder, "varied": group.varied, "method": name, "seeds": len(runs),
        "trained_beside_head": next(iter(runs.values()))["trained_numbers"] - head,
        "dice_mean": statistics.mean(dice), "dice_sd": statistics.stdev(dice) if len(dice) > 1 else "",
        "base": group.base, "difference": "", "difference_sd": "", "low": "", "high": "",
    }  # fmt: skip
    seeds = [seed for seed in runs if seed in base]
    if (group.base_folder, group.base) == (group.folder, name) or not seeds:
        return row
    shared = [runs[seed]["dice"] - base[seed]["dice"] for seed in seeds]
    own, other = (
        [cases[folder, method, seed] for seed in seeds]
        for folder, method in ((group.folder, name), (group.base_folder, group.base))
    )
    by_case = [finite_mean([a[case] - b[case] for a, b in zip(own, other, strict=True)]) for case in own[0]]
    low, high = interval([value for value in by_case if not math.isnan(value)], fewest=2)
    spread = statistics.stdev(shared) if len(shared) > 1 else ""
    return row | {"difference": statistics.mean(shared), "difference_sd": spread, "low": low, "high": high}


def _runs(metrics: list[dict[str, Any]], folder: str, method: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in metrics if (row["group"], row["method"]) == (folder, method)}


def ablations(
    work: Annotated[Path, typer.Argument(metavar="WORK", help="Folder for data, the pretrained network and runs.")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Gets summary.csv, metrics.csv and run.json.")],
    maps: Annotated[Path, typer.Option(help="SynthSeg's label maps.")],
    data: Annotated[Path, typer.Option(help="The real data.")],
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = 3,
    only: Annotated[str, typer.Option(help="Only groups or methods whose name has one of these words, a,b.")] = "",
    steps: Annotated[int, typer.Option(help="Of every method.")] = STEPS,
    other_steps: Annotated[int, typer.Option(help="Of learning factors on other cases.")] = OTHER_STEPS,
) -> None:
    """Change one option of the adapter at a time and compare Dice with that of the base setting."""
    display = Display(Console(width=140))
    setting, runs = hippocampus_setting(work, maps, data, display), work / "ablations"
    words = [word for word in only.split(",") if word]
    chosen = {
        group: [name for name in group.methods if not words or any(w in f"{group.folder} {name}" for w in words)]
        for group in GROUPS
    }
    chosen[GROUPS[0]] = list(GROUPS[0].methods)  # which all others are compared with
    for group, methods in chosen.items():
        if not methods:
            continue
        if group.folder == "carried":
            learn_subspaces(setting, data, work, runs / "subspaces", other_steps, display)
        named = [name.format(runs / "subspaces") for name in methods]
        try:
            run_group(group, named, setting, runs / group.folder, seeds, steps, display)
        finally:  # what is finished of an interrupted group counts
            if (runs / GROUPS[0].folder / "metrics.csv").is_file():
                collect(runs, results)
    display.say(f"{results / 'summary.csv'}: {sum(map(len, chosen.values()))} methods of {len(GROUPS)} groups")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(ablations, arguments, "python -m tcurlora_ext.bench.ablations")


if __name__ == "__main__":
    sys.exit(main())
