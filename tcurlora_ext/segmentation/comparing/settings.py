"""The settings of a comparison, and those of the runs that it consists of."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.methods import Method
from tcurlora_ext.segmentation.metrics.comparison import REFERENCE
from tcurlora_ext.segmentation.runs.finetuning import check_settings, with_rates
from tcurlora_ext.segmentation.runs.folder import RESULT
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, read_settings

ALL = "all"  # the training set of every case of the training list


@dataclass(frozen=True, kw_only=True)
class CompareSettings(FinetuneSettings):
    """Options of `tcurlora compare`: those of finetune, whose `shots` stays None, and what is compared.

    Attributes:
        training_sets: What is trained on: a number of subjects, drawn from the training list, the name of another list
            of splits.json, or "all" for the training list.
        reference: The method that the others are tested against; None: lora, or else the first one.
        subject_file: A JSON file with the subject of each case by its name, for the tests; None: by `subject_pattern`.
        measure: Whether the time and memory of steps are measured side by side once all methods have been trained.
    """

    training_sets: tuple[str, ...] = (ALL,)
    reference: str | None = None
    subject_file: Path | None = None
    measure: bool = False


@dataclass(frozen=True)
class Part:
    """One of the runs of a comparison.

    Attributes:
        name: Of its training set.
        out: Its run folder.
        settings: Of the run.
    """

    name: str
    out: Path
    settings: FinetuneSettings


@dataclass(frozen=True)
class Plan:
    """What is compared, checked as far as that is possible without data.

    Attributes:
        settings: With the learning rate of each method.
        out: The folder of the comparison.
        methods: In the order of tables.
        reference: The name of the one that the others are tested against.
        subjects: Of each case that the file of subjects names.
    """

    settings: CompareSettings
    out: Path
    methods: tuple[Method, ...]
    reference: str
    subjects: Mapping[str, str]

    def parts(self, data: Path, pretrained: Path) -> list[Part]:
        """The runs, with a folder each: lists in the order given, then numbers by size, then all cases.

        Args:
            data: The data set of all of them.
            pretrained: Their base.
        """
        names = sorted(self.settings.training_sets, key=_size)
        return [Part(name, self.out / folder_of(name), self._settings(name, data, pretrained)) for name in names]

    def _settings(self, name: str, data: Path, pretrained: Path) -> FinetuneSettings:
        values: dict[str, Any] = {field.name: getattr(self.settings, field.name) for field in fields(FinetuneSettings)}
        values = copy.deepcopy(values) | {"data": data, "pretrained": pretrained}
        if name.isdecimal():
            values["shots"] = int(name)
        elif name != ALL:
            values["train_list"] = name
        return FinetuneSettings(**values)


def _size(training_set: str) -> float:
    """The number of subjects; of a list, which has a name, no number and so the least; of all cases the most."""
    if training_set == ALL:
        return math.inf
    return int(training_set) if training_set.isdecimal() else 0


def folder_of(training_set: str) -> str:
    """The name of the run folder of a training set: lists inside objects are named with a slash."""
    return training_set.replace("/", "_")


def make_plan(settings: CompareSettings, out: Path) -> Plan:
    """Check the settings of a comparison.

    Raises:
        ValueError, FileNotFoundError: One of them is wrong; the message names it.
    """
    methods = tuple(check_settings(settings))
    _check_sets(settings)
    names = [method.name for method in methods]
    if settings.reference is not None and settings.reference not in names:
        raise ValueError(f"reference: found '{settings.reference}', expected one of the methods {', '.join(names)}")
    reference = reference_of(methods, settings.reference)
    subjects = {} if settings.subject_file is None else _read_subjects(settings.subject_file)
    return Plan(replace(settings, lr=with_rates(settings, methods).lr), out, methods, reference, subjects)


def reference_of(methods: Sequence[Method], wanted: str | None) -> str:
    """The method that the others are tested against: the one wanted, where it is there; else lora, or the first."""
    names = [method.name for method in methods]
    return next((name for name in (wanted, REFERENCE) if name in names), names[0])


def with_earlier(settings: CompareSettings, out: Path) -> tuple[CompareSettings, str]:
    """The settings with what the comparison in a folder has beside them, and this in words; "" where it is nothing.

    Raises:
        ValueError: The folder has a run of another command.
    """
    if not (out / "run.json").is_file():
        return settings, ""
    earlier, more = read_settings(out, "compare", CompareSettings), []
    changes: dict[str, Any] = {"lr": {**earlier.lr, **settings.lr}, "seeds": max(earlier.seeds, settings.seeds)}
    for field, word in (("methods", "method"), ("training_sets", "training set")):
        before, now = getattr(earlier, field), getattr(settings, field)
        changes[field] = tuple(dict.fromkeys([*before, *now]))
        more += [f"{word} {name}" for name in before if name not in now]
    if earlier.seeds > settings.seeds:
        more.append(f"{earlier.seeds} seeds")
    return replace(settings, **changes), ", ".join(more)


def _check_sets(settings: CompareSettings) -> None:
    names = settings.training_sets
    folders = [folder_of(name) for name in names]
    empty = [name for name in names if not name or name.startswith(".")]
    if empty or not names:
        raise ValueError(f"shots: found '{','.join(names)}', expected numbers of subjects or names of lists")
    twice = sorted({name for name, own in zip(names, folders, strict=True) if folders.count(own) > 1})
    if twice or len({int(name) for name in names if name.isdecimal()}) < sum(name.isdecimal() for name in names):
        raise ValueError(f"shots: found '{','.join(names)}', expected each once")
    if settings.fold is not None and any(not name.isdecimal() and name != ALL for name in names):
        raise ValueError(f"shots: found '{','.join(names)}' beside fold {settings.fold}, expected numbers or {ALL}")


def _read_subjects(path: Path) -> dict[str, str]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, (str, int)) for value in content.values()):
        raise ValueError(f'{path}: found another form, expected the subject of each case: {{"CASE": "SUBJECT", ...}}')
    return {str(case): str(subject) for case, subject in content.items()}


def finished(part: Part, methods: Sequence[Method], seeds: int) -> bool:
    """Whether every method and seed of a run has its result."""
    return all((part.out / m.folder / f"seed{seed}" / RESULT).is_file() for m in methods for seed in range(seeds))
