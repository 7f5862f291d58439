"""The classes of a data set: their names, and the values that stand for them in labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.cases import Case


def declared_classes(
    path: Path, description: dict[str, Any], labels: Sequence[str] | None
) -> dict[int, str] | None:  # fmt: skip
    """Class names by label value, from `labels` or from dataset.json: {"0": "background"} or {"background": 0}.

    Args:
        path: Of dataset.json, for error messages.
        description: Its content.
        labels: Class names, background first, in place of those in `description`.

    Returns:
        None where neither names them.

    Raises:
        ValueError: There are fewer than two classes, their values are not 0, 1, ..., or they have another form.
    """
    if labels is not None:
        if len(labels) < 2:
            raise ValueError(f"labels: found {list(labels)}, expected background and at least one class")
        return dict(enumerate(labels))
    content = description.get("labels")
    if content is None:
        return None
    form = '{"0": "background", "1": ...}'
    if isinstance(content, dict):
        regions = [name for name, value in content.items() if isinstance(value, list)]
        if regions:
            raise ValueError(f"{path}: found the region '{regions[0]}' of several values (nnU-Net), expected {form}")
        if "ignore" in content:
            raise ValueError(
                f"{path}: found the label 'ignore' (nnU-Net), expected classes alone: every voxel counts in the loss"
            )
    try:
        pairs = {int(key): str(value) for key, value in content.items()}
    except (ValueError, AttributeError):
        try:
            pairs = {int(value): str(key) for key, value in content.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}: found labels {content}, expected {form}") from None
    if sorted(pairs) != list(range(len(pairs))) or len(pairs) < 2:
        raise ValueError(f"{path}: found the label values {sorted(pairs)}, expected 0, 1, ... without a gap")
    return dict(sorted(pairs.items()))


def observed_classes(
    train: Sequence[Case], val: Sequence[Case], train_values: Sequence[set[int]], val_values: Sequence[set[int]]
) -> dict[int, str]:
    """The classes where none are declared: the values in the training labels. ValueError for others in validation."""
    values: set[int] = {0}.union(*train_values)
    if sorted(values) != list(range(len(values))):
        raise ValueError(
            f"{train[0].label.parent}: found the label values {sorted(values)} in training cases, expected 0, 1, ... "
            "without a gap; name them in dataset.json or with --labels"
        )
    for case, seen in zip(val, val_values, strict=True):
        if seen - values:
            raise ValueError(
                f"{case.label}: found label values {sorted(seen - values)}, expected {sorted(values)} as in training; "
                "name the classes in dataset.json or with --labels"
            )
    return {value: "background" if value == 0 else f"label {value}" for value in sorted(values)}


def check_foreground(
    train: Sequence[Case], val: Sequence[Case], train_values: Sequence[set[int]], val_values: Sequence[set[int]],
    classes: dict[int, str] | None,
) -> None:  # fmt: skip
    """Raise ValueError where no training label has a foreground voxel; warn where no validation label has one.

    Args:
        train: The training cases.
        val: The validation cases.
        train_values: The values in each training label.
        val_values: The values in each validation label.
        classes: Declared class names by value; None where the values of the training labels are the classes.
    """
    learned: set[int] = set().union(*train_values)
    if not learned - {0}:
        expected = "values from 1" if classes is None else ", ".join(f"{v} ({n})" for v, n in classes.items() if v)
        raise ValueError(
            f"{train[0].label.parent}: found no foreground voxel in the labels of {len(train)} training cases "
            f"({train[0].label.name}, ...), expected {expected}"
        )
    if not set().union(*val_values) - {0}:
        warnings.warn(
            f"{val[0].label.parent}: found no foreground voxel in the labels of {len(val)} validation cases "
            f"({val[0].label.name}, ...), so that no Dice can be taken",
            stacklevel=3,  # who called read_dataset
        )
