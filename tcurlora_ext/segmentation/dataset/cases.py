"""The cases of a data set: those that train, those that validate, and those that have a label."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from tcurlora_ext.segmentation.dataset.formats import FORMS, other_volumes
from tcurlora_ext.segmentation.dataset.formats import SUFFIXES as SUFFIXES  # also known by this name
from tcurlora_ext.segmentation.dataset.layouts import Case as Case  # also known by this name
from tcurlora_ext.segmentation.dataset.layouts import Files, Layout
from tcurlora_ext.segmentation.dataset.layouts.files import refuse_shared
from tcurlora_ext.segmentation.dataset.splits import FINAL, fold_cases, listed_cases, random_split

VAL_FRACTION = 0.2  # of the cases, where nothing else says which validate

Pair = tuple[tuple[Case, ...], tuple[Case, ...]]


class Split(NamedTuple):
    """The training and the validation cases of a data set, and what divides them, in words."""

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    origin: str


def choose_cases(
    layout: Layout, *, train_list: str, val_list: str, val_fraction: float | None, seed: int, fold: int | None
) -> Split:
    """The training and the validation cases of a data set, which have no case in common.

    Args:
        layout: The data set.
        train_list: The list of splits.json to train on.
        val_list: The list of splits.json to validate on.
        val_fraction: Fraction of the cases that is drawn for validation where nothing else says which validate; None:
            ``VAL_FRACTION``.
        seed: Of that draw.
        fold: The fold whose lists are taken; None: splits.json, or the lists of a data list.

    Raises:
        FileNotFoundError: A file, folder or list is missing.
        ValueError: A list has another form than expected, a case is not unique, two cases have one file, or a fraction
            is given where something else says which cases validate.
    """
    splits, given = layout.root / "splits.json", (train_list, val_list) != ("train", "val")
    if fold is not None:
        if given or val_fraction is not None:
            other = f"the list '{train_list if train_list != 'train' else val_list}'" if given else "a val-fraction"
            raise ValueError(f"fold: found {fold} and {other}, expected one of the two")
        lists = fold_cases(layout, fold)
        (train, val), origin = (lists["train"], lists["val"]), f"fold {fold}"
    elif splits.is_file():
        _refuse_fraction(val_fraction, splits)
        train, val = (listed_cases(splits, name, layout.files) for name in (train_list, val_list))
        origin = f"the lists '{train_list}' and '{val_list}' of {splits.name}"
    else:
        for name, default in ((train_list, "train"), (val_list, "val")):
            if name != default:
                raise FileNotFoundError(f"{splits}: no such file; expected it to hold the list '{name}'")
        if layout.files.validation is not None:
            _refuse_fraction(val_fraction, layout.source)
            (train, val), origin = _by_lists(layout), f"the lists of {layout.source.name}"
        else:
            fraction = VAL_FRACTION if val_fraction is None else val_fraction
            (train, val), origin = _drawn(layout, fraction, seed), f"a random draw with data-seed {seed}"
    both = sorted({case.name for case in train} & {case.name for case in val})
    if both:
        raise ValueError(
            f"{layout.root}: found {', '.join(both[:5])} in both lists, expected training and validation apart"
        )  # fmt: skip
    refuse_shared(layout.root, ((case.image, case.label) for case in (*train, *val)))
    return Split(train, val, origin)


def _refuse_fraction(fraction: float | None, source: object) -> None:
    if fraction is not None:
        raise ValueError(
            f"val-fraction: found {fraction} beside {source}, whose lists say which cases "
            "validate; expected one of the two"
        )


def _by_lists(layout: Layout) -> Pair:
    """The lists "training" and "validation" of a data list."""
    files, held_out = layout.files, set(layout.files.validation or ())
    cases = [files.case(name, str(layout.source)) for name in files.images]
    return (
        tuple(case for case in cases if case.name not in held_out),
        tuple(case for case in cases if case.name in held_out),
    )


def _drawn(layout: Layout, fraction: float, seed: int) -> Pair:
    """A random split, with a warning of each kind of file that it leaves out."""
    for unread in (layout.root / FINAL, layout.root / "splits_final.pkl"):
        if unread.is_file():
            form = "--fold N for one of its folds" if unread.name == FINAL else "splits.json with train and val"
            _warn(f"{unread}: not read, the cases are split at random; expected {form}")
    if layout.files.folds:
        _warn(f"{layout.source}: the keys 'fold' are not read, the cases are split at random; expected --fold N")
    train, val = random_split(layout.files, fraction, seed)
    for message in _unused(layout.files, (*train, *val)):
        _warn(message)
    return train, val


def labelled_cases(layout: Layout, list_name: str | None, fold: int | None = None) -> tuple[Case, ...]:
    """Cases that have a label: those of a list, or all of them in the order of names.

    Args:
        layout: The data set.
        list_name: A list of splits.json or, with a fold, "train" or "val"; None for all cases, or the fold's "val".
        fold: The fold.

    Raises:
        FileNotFoundError: A file, folder or list is missing.
        ValueError: A list has another form than expected, or a case is not unique.
    """
    if fold is not None:
        lists = fold_cases(layout, fold)
        if (list_name or "val") not in lists:
            raise ValueError(f"list: found '{list_name}' of fold {fold}, expected one of {', '.join(lists)}")
        return lists[list_name or "val"]
    if list_name is not None:
        return listed_cases(layout.root / "splits.json", list_name, layout.files)
    if not layout.files.labels:
        raise ValueError(f"{layout.files.label_source}: found no labels, expected at least one, {FORMS}")
    return layout.files.all_cases()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # who called read_dataset


def _unused(files: Files, cases: Sequence[Case]) -> list[str]:
    """What lies in the folders and belongs to no case, in a line for each kind."""
    used = {case.image for case in cases}
    alone = [images[0] for images in files.images.values() if images[0] not in used]
    lines = []
    if alone:
        lines.append(f"{files.image_source}: {len(alone)} images have no label and are not used ({alone[0].name}, ...)")
    others = {place: other_volumes(place) for place in (files.image_source, files.label_source) if place.is_dir()}
    lines += [
        f"{place}: {len(unread)} volumes are not read ({unread[0].name}, ...), expected each {FORMS}"
        for place, unread in others.items()
        if unread
    ]
    return lines
