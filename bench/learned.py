"""Learned factors beside LoRA, the paper's stacks and the head alone: the tables of docs/learned.md.

Two settings: real hippocampus MRI (the network and data of bench/hippocampus.py), and the embedded brains of the demo.
In each the factors are learned on the same few cases (tcur-learned), or carried from other cases (tcur-carried) that
are neither trained on nor validated on afterwards. A third, other-label, is hippocampus with its anterior part alone as
the class, over subspaces that were learned on other classes.

    python -m tcurlora_ext.bench.learned hippocampus WORK RESULTS --maps SYNTHSEG_MAPS --data HIPPOCAMPUS
    python -m tcurlora_ext.bench.learned other-label WORK RESULTS --maps SYNTHSEG_MAPS --data HIPPOCAMPUS
    python -m tcurlora_ext.bench.learned embedded WORK RESULTS

With --choose it measures, on cases of their own, the steps of the warm-up and the bits of the directions, of which the
defaults were chosen. A run that was stopped resumes when it is started again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.learning import warmup
from tcurlora_ext.bench.entry import run_command
from tcurlora_ext.bench.hippocampus import make_target, prepare, pretrain_folder, publish
from tcurlora_ext.bench.reading.methods import RIVAL
from tcurlora_ext.io.records import read_csv, read_json, write_csv, write_json
from tcurlora_ext.maths.coding import CODED_BITS
from tcurlora_ext.segmentation.dataset.synthetic import write_domain
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.learning import LearnSettings, learn
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display

STEPS = 120  # of every method
OTHER_STEPS = 240  # on the other cases, of which there are more
WARM_UPS, BITS = (30, 60, 120), (1, 2, 4, 8, 32)
PARTS = {"anterior": 1, "posterior": 2}  # values of the real labels
WIDE = (8, 32)  # ranks over a subspace of other labels


@dataclass(frozen=True)
class Cases:
    """A data set and its two lists."""

    folder: Path
    train: str
    val: str


@dataclass(frozen=True)
class Setting:
    """A pretrained network, the cases of the table, other cases of the same kind, and those to choose defaults on."""

    base: Path
    target: Cases
    others: Cases
    choice: Cases
    lr: dict[str, float]


def hippocampus_setting(work: Path, maps: Path, data: Path, display: Display, network: str = "vit") -> Setting:
    """Five subjects, 48 validation volumes; 16 other subjects; and five more with 24 volumes to choose on."""
    base, target = prepare(maps, data, work, 600, display, network)
    path = target / "splits.json"
    splits = read_json(path)
    if "others" not in splits:
        lists = splits["few_shot"]
        five = lists["5_subjects_seed0"]
        others = _of_other_subjects(lists["20_subjects_seed0"], five)
        choice = _of_other_subjects(lists["5_subjects_seed1"], [*five, *others])
        rest = _of_other_subjects(splits["train"], [*five, *others, *choice])
        write_json(path, {**splits, "others": others, "choice": choice, "choice_val": rest[::4][:24]})
    return Setting(
        base, Cases(target, "5_subjects_seed0", "val"), Cases(target, "others", "choice_val"),
        Cases(target, "choice", "choice_val"), {"head": 1e-3},
    )  # fmt: skip


def _of_other_subjects(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The volumes of subjects that none of the known volumes is of: 2k - 1 and 2k are the two sides of one scan."""
    subjects = {subject_of(name) for name in known}
    return [name for name in names if subject_of(name) not in subjects]


def subject_of(name: str) -> int:
    """The subject of a volume of the hippocampus: 2k - 1 and 2k are of subject k."""
    return (int(name) + 1) // 2


def embedded_setting(work: Path, display: Display, network: str = "vit") -> Setting:
    """Four and eight brains of the target domain; 19 others; and four with eight to choose on."""
    base = pretrain_folder(work, network)
    if not (base / "transformer.json").is_file():
        pretrain(PretrainSettings(network=network), base, resume=True, display=display)
    cases = []
    for name, seed, train, val in (("target", 0, 4, 8), ("others", 1, 19, 1), ("choice", 2, 4, 8)):
        folder = work / "data" / name
        if not (folder / "splits.json").is_file():
            write_domain(folder, "target", train, val, seed=seed)
        cases.append(Cases(folder, "train", "val"))
    target, others, choice = cases
    return Setting(base / "base.safetensors", target, others, choice, {})


def settings_of(setting: Setting, cases: Cases, methods: Sequence[str], seeds: int, steps: int) -> FinetuneSettings:
    """Settings to adapt the setting's network to some of its cases."""
    return FinetuneSettings(
        cases.folder, setting.base, tuple(methods), seeds, steps=steps, lr=setting.lr, train_list=cases.train,
        val_list=cases.val,
    )  # fmt: skip


def run_methods(settings: FinetuneSettings, folder: Path, display: Display) -> None:
    """Run the methods in a folder, or go on with those that are in it."""
    finetune(settings, folder, resume=(folder / "run.json").is_file(), display=display)


def compare(setting: Setting, work: Path, results: Path, seeds: int, only: str, display: Display) -> None:
    """Run the methods of the table, those that need other cases after what they need."""
    carried, lora = work / "carried.safetensors", work / "lora-others"
    on_others = settings_of(setting, setting.others, (RIVAL,), 1, OTHER_STEPS)
    if not carried.is_file():
        learn(LearnSettings(on_others, TCURConfig.preset("learned"), OTHER_STEPS), carried, display)
    run_methods(on_others, lora, display)
    # Of the same seed: the full fine-tuning of this run.
    full = work / "table" / "full" / "seed{seed}" / "adapter.safetensors"
    methods = [
        "head", "norms", "full", "lora", "lora:rank=1", f"lora:bits={CODED_BITS}",
        f"lora:init={lora / 'lora' / 'seed0' / 'adapter.safetensors'}", "tcur", "tcur:orthonormal=true",
        "tcur-light:rank=8", "tcur-light", "tcur-learned", "tcur-learned:bits=1", "tcur-learned:bits=32",
        "tcur-learned:rank=4", "tcur-learned:rows_only=true", f"tcur-learned:change={full}",
        *(f"tcur-carried:factors={carried}:rank={rank}" for rank in (8, 4, 2, 1)),
    ]  # fmt: skip
    wanted = [name for name in methods if not only or any(word in name for word in only.split(","))]
    if "full" not in wanted:  # from which this one takes its directions
        wanted = [name for name in wanted if "change=" not in name]
    run, longer = work / "table", work / "as-many-steps"
    run_methods(settings_of(setting, setting.target, wanted, seeds, STEPS), run, display)
    # LoRA with as many steps as a warm-up and the steps after it take together.
    together = STEPS + warmup.STEPS
    run_methods(settings_of(setting, setting.target, (RIVAL,), seeds, together), longer, display)
    publish(run, results)
    rows = read_csv(longer / "metrics.csv")
    name = f"{RIVAL}, {together} steps"
    write_csv(results / "metrics.csv", [*read_csv(run / "metrics.csv"), *({**row, "method": name} for row in rows)])


def other_label(setting: Setting, data: Path, work: Path, results: Path, seeds: int, display: Display) -> None:
    """Adapt to the anterior part over subspaces of rank 32: of the whole hippocampus, and of it and the posterior part.

    Both are learned on the other subjects. A lower rank takes the leading directions.
    """
    anterior, posterior = (part_of(data, work / name, value, setting) for name, value in PARTS.items())
    config = TCURConfig.preset("learned", rank=max(WIDE))
    on_others = settings_of(setting, setting.others, (RIVAL,), 1, OTHER_STEPS)
    files = {"whole": (), "labels": (posterior,)}
    for name, more in files.items():
        if not (work / f"{name}.safetensors").is_file():
            learn(LearnSettings(on_others, config, OTHER_STEPS, more=more), work / f"{name}.safetensors", display)
    methods = [
        "head", "lora", "lora:rank=1", "tcur:orthonormal=true",
        *(f"tcur-carried:factors={work / name}.safetensors:rank={rank}" for name in files for rank in WIDE),
    ]  # fmt: skip
    cases, run = replace(setting.target, folder=anterior), work / "other-label"
    run_methods(settings_of(setting, cases, methods, seeds, STEPS), run, display)
    publish(run, results)


def part_of(data: Path, folder: Path, value: int, setting: Setting) -> Path:
    """Write the real data with one part of the hippocampus as the class, and the setting's lists of cases."""
    if not (folder / "splits.json").is_file():
        make_target(data, folder, parts=(value,))
        write_json(folder / "splits.json", read_json(setting.target.folder / "splits.json"))
    return folder


def choose(setting: Setting, work: Path, results: Path, seeds: int, display: Display) -> None:
    """Vary the warm-up's steps and the bits, on cases that the table does not have."""
    methods = [RIVAL]
    methods += [f"tcur-learned:warm_up={steps}:bits=32" for steps in WARM_UPS]
    methods += [f"tcur-learned:bits={bits}" for bits in BITS if bits != 32]
    run = work / "choice"
    run_methods(settings_of(setting, setting.choice, methods, seeds, STEPS), run, display)
    publish(run, results)


def learned(
    setting: Annotated[str, typer.Argument(metavar="SETTING", help="hippocampus, other-label or embedded.")],
    work: Annotated[Path, typer.Argument(metavar="WORK", help="Folder for data, the pretrained network and runs.")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Gets summary.csv, metrics.csv and run.json.")],
    maps: Annotated[Path | None, typer.Option(help="SynthSeg's label maps, for hippocampus.")] = None,
    data: Annotated[Path | None, typer.Option(help="The real data, for hippocampus.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = 3,
    only: Annotated[str, typer.Option(help="Only methods whose name contains one of these words, a,b.")] = "",
    choosing: Annotated[
        bool, typer.Option("--choose", help="Vary the steps of the warm-up and the bits on other cases instead.")
    ] = False,
) -> None:
    """Compare learned factors with LoRA and the paper's stacks in one of two settings."""
    display = Display(Console(width=140))
    if setting in ("hippocampus", "other-label"):
        if maps is None or data is None:
            raise ValueError(f"maps, data: expected both for {setting}")
        chosen = hippocampus_setting(work, maps, data, display)
    elif setting == "embedded":
        chosen = embedded_setting(work, display)
    else:
        raise ValueError(f"setting: found '{setting}', expected hippocampus, other-label or embedded")
    if choosing:
        choose(chosen, work, results, seeds, display)
    elif setting == "other-label" and data is not None:
        other_label(chosen, data, work, results, seeds, display)
    else:
        compare(chosen, work, results, seeds, only, display)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(learned, arguments, "python -m tcurlora_ext.bench.learned")


if __name__ == "__main__":
    sys.exit(main())
