"""Training cases divided by subject: what is held out of a training, and folds of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.dataset.subjects import by_subject
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.runs.folder import record
from tcurlora_ext.segmentation.terminal import Display


def folds(names: Sequence[str], count: int, seed: int, pattern: str | None) -> list[list[int]]:
    """Indices of cases in `count` parts of as nearly as many subjects each; no subject is in two parts.

    Raises:
        ValueError: There are fewer subjects than parts.
    """
    require_package("monai")
    from monai.data.utils import partition_dataset

    subjects = by_subject(names, pattern)
    if len(subjects) < count:
        raise ValueError(f"found {len(subjects)} training subjects, expected at least {count}, one for each part")
    parts = partition_dataset(subjects, num_partitions=count, shuffle=True, seed=seed)
    return [sorted(index for subject in part for index in subject) for part in parts]


def hold_out(names: Sequence[str], settings: Any) -> tuple[list[int], list[int]]:
    """Indices of the cases to train on and of those held out: a fraction of the subjects, drawn from the data's seed.

    At least one subject is held out, and at least one is trained on.

    Args:
        names: Of the training cases.
        settings: Of finetune or pretrain.

    Raises:
        ValueError: There are fewer than two subjects.
    """
    import numpy as np

    subjects = by_subject(names, settings.subject_pattern)
    if len(subjects) < 2:
        raise ValueError(
            f"select, patience: found {len(subjects)} training subject, expected two or more: one is held out of the "
            "training"
        )
    count = min(max(1, round(settings.select_fraction * len(subjects))), len(subjects) - 1)
    held = set(np.random.default_rng([settings.data_seed, 3]).permutation(len(subjects))[:count].tolist())
    parts: tuple[list[int], list[int]] = ([], [])
    for number, subject in enumerate(subjects):
        parts[number in held].extend(subject)
    return sorted(parts[0]), sorted(parts[1])


def record_held_out(names: Sequence[str], settings: Any, out: Path, display: Display) -> None:
    """Write to run.json, and say, which training cases are held out, where the settings hold out any."""
    if not settings.holds_out:
        return
    kept, held = ([names[index] for index in part] for part in hold_out(names, settings))
    record(out, "selection", {"train": kept, "held_out": held})
    display.say(
        f"held out of the training, to choose when it is best: {', '.join(held)} ({len(held)} of {len(names)} training "
        "cases)"
    )
