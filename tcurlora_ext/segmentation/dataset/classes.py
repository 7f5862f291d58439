"""The classes of a data set: their names, and the values that stand for them in labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.dataset.layouts import Case

IGNORE = "ignore"  # nnU-Net's name for voxels that count neither in the loss nor in scores


def check_mapping(mapping: Mapping[int, int] | None) -> dict[int, int]:
    """The values that stand for others in labels. ValueError unless all are whole numbers from 0 and differ."""
    pairs = {} if mapping is None else {int(old): int(new) for old, new in mapping.items()}
    for old, new in pairs.items():
        if min(old, new) < 0 or old == new:
            raise ValueError(f"map-labels: found {old}={new}, expected two different whole numbers from 0")
    return pairs


def ignored_value(path: Path, description: Mapping[str, Any]) -> int | None:
    """The value of the label "ignore" in dataset.json; None where it names none. ValueError for another form."""
    content = description.get("labels")
    if not isinstance(content, dict) or IGNORE not in content:
        return None
    value = content[IGNORE]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{path}: found {value!r} as the label 'ignore', expected one whole number above 0")
    return value


def declared_classes(
    path: Path, description: dict[str, Any], labels: Sequence[str] | None, mapping: Mapping[int, int] | None = None
) -> dict[int, str] | None:
    """Class names by label value, from `labels` or from dataset.json: {"0": "background"} or {"background": 0}.

    nnU-Net's label "ignore" is no class. A value that is mapped hands its name to the new value, unless that has one.

    Args:
        path: Of dataset.json, for error messages.
        description: Its content.
        labels: Class names, background first, in place of those in `description`.
        mapping: Values that stand for others in labels.

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
        regions = [name for name, value in content.items() if isinstance(value, list) and name != IGNORE]
        if regions:
            raise ValueError(f"{path}: found the region '{regions[0]}' of several values (nnU-Net), expected {form}")
        content = {name: value for name, value in content.items() if name != IGNORE}
    try:
        pairs = {int(key): str(value) for key, value in content.items()}
    except (ValueError, AttributeError):
        try:
            pairs = {int(value): str(key) for key, value in content.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}: found labels {content}, expected {form}") from None
    mapped = {new: pairs[old] for old, new in (mapping or {}).items() if old in pairs}
    pairs = mapped | {value: name for value, name in pairs.items() if value not in (mapping or {})}
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
