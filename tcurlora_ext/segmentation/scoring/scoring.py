"""Scores of each case, method and label: of the adapted networks of a run, and of label maps in folders.

Scores are taken on the label's own grid, as in training: the truth is never resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.dataset import IGNORED, load_label, load_volumes, with_label_values
from tcurlora_ext.segmentation.dataset.cases import labelled_cases
from tcurlora_ext.segmentation.dataset.classes import check_mapping, declared_classes
from tcurlora_ext.segmentation.dataset.formats import NIFTI, load_image
from tcurlora_ext.segmentation.dataset.integrity import check_case
from tcurlora_ext.segmentation.dataset.layouts import Case, read_layout
from tcurlora_ext.segmentation.dataset.preparation import Preparation
from tcurlora_ext.segmentation.metrics.evaluation import (
    OVERLAP,
    dice_scores,
    hd95_scores,
    one_hot_pair,
    predict,
    surface_dice_scores,
)
from tcurlora_ext.segmentation.prediction.predictor import Run, load_predictor
from tcurlora_ext.segmentation.terminal import Display

TOLERANCE = 1.0  # mm, of the surface Dice

Row = dict[str, Any]


@dataclass(frozen=True)
class Cases:
    """Labelled cases whose files have been checked.

    Attributes:
        cases: Their files.
        labels: Class names by the value in labels.
        source: Which cases these are, in words.
    """

    cases: tuple[Case, ...]
    labels: dict[int, str]
    source: str


def find_cases(
    data: Path | None, run: Run | None, list_name: str | None = None, labels: Sequence[str] | None = None,
    predictions: Mapping[str, Path] | None = None, fold: int | None = None,
    map_labels: Mapping[int, int] | None = None,
) -> Cases:  # fmt: skip
    """The cases to score, all of whose files have been checked.

    Args:
        data: The data set; None for that of the run.
        run: The run to score; None where only folders of label maps are.
        list_name: The list of splits.json to score, or "all". None: of the run's own data set the validation cases,
            of another one all cases; and where there are folders of label maps, those of them that have one in each.
        labels: Class names, background first, where neither run nor dataset.json has them.
        predictions: Folders of label maps by name.
        fold: The fold whose list "val", or `list_name`, is scored.
        map_labels: Values that stand for others in labels; None: as in the run.

    Raises:
        FileNotFoundError, ValueError: A file is missing, damaged or does not fit the others, or there is no case.
    """
    own = None if run is None else Path(run.description["settings"]["data"] or run.folder / "data" / "target")
    root = data or own
    if root is None:
        raise ValueError("data: found none, expected the folder of a data set with labels")
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; expected a data set with images and labels")
    layout = read_layout(root)
    if map_labels is None and run is not None:
        map_labels = {int(old): new for old, new in (run.description["settings"].get("map_labels") or {}).items()}
    mapping = check_mapping(map_labels)
    declared = declared_classes(layout.source, layout.description, labels, mapping)
    if run is not None:
        if declared is not None and declared != run.labels:
            raise ValueError(f"{root}: found the classes {declared}, expected {run.labels} as in {run.folder}")
        declared = run.labels
    cases = with_label_values(
        labelled_cases(layout, None if list_name == "all" else list_name, fold), layout, mapping
    )  # fmt: skip
    source = f"{root}, all labelled cases" if list_name in (None, "all") else f"{root}, list '{list_name}'"
    if fold is not None:
        source = f"{root}, fold {fold}, list '{list_name or 'val'}'"
    elif list_name is None and run is not None and own is not None and root.resolve() == own.resolve():
        validation = set(run.description["data"]["val"])
        cases = tuple(case for case in cases if case.name in validation)
        source = f"{root}, the run's validation cases"
    elif list_name is None and predictions:
        there = [set(label_maps(folder)) for folder in predictions.values()]
        every, cases = cases, tuple(case for case in cases if all(case.name in names for names in there))
        source = f"{root}, {len(cases)} of {len(every)} labelled cases, those that have a label map"
        if not cases and every:
            found = ", ".join(
                f"{min(names)} in {folder}" for folder, names in zip(predictions.values(), there, strict=True)
            )
            raise ValueError(f"{source}: found {found}, expected names as those of the cases, such as {every[0].name}")
    if not cases:
        raise ValueError(f"{source}: found no case, expected at least one")
    return Cases(cases, _check(cases, declared, run), source)


def _check(cases: Sequence[Case], declared: dict[int, str] | None, run: Run | None) -> dict[int, str]:
    """Check the files; returns the classes, which are the values in the labels where none are declared."""
    channels = None
    if run is not None:
        channels = int(read_json(run.folder / "network.json")["in_channels"])
    values = {0}
    for case in cases:
        found, seen = check_case(case, declared)
        values |= set(seen.values())
        if channels is not None and found != channels:
            raise ValueError(f"{case.image}: found {found} channels, expected {channels} as in training")
    return declared or {value: f"label {value}" if value else "background" for value in sorted(values)}


def label_maps(folder: Path) -> dict[str, Path]:
    """The label maps of a folder by the names of their cases. FileNotFoundError or ValueError where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected label maps in it")
    files = {
        path.name.removesuffix(suffix): path
        for suffix in reversed(NIFTI)
        for path in sorted(folder.iterdir())
        if path.name[0] != "." and path.name.endswith(suffix)
    }
    if not files:
        raise ValueError(f"{folder}: found no label map in this folder, expected NIfTI files named as the cases")
    return files


def score_run(
    run: Run, chosen: Mapping[str, Sequence[int]], cases: Cases, *, overlap: float = OVERLAP,
    device: torch.device | str = "cpu", display: Display | None = None,
) -> list[Row]:  # fmt: skip
    """Predict the cases by each method and seed of a run and score them; one case is in memory at a time.

    Args:
        run: The run.
        chosen: The seeds of each method.
        cases: Of :func:`find_cases` with this run.
        overlap: Of neighbouring windows.
        device: Where the networks compute.
        display: Where progress is shown.

    Returns:
        Rows of :func:`score_case`, with method, seed and case before the scores.
    """
    display, rows = display or Display(), []
    for method, seeds in chosen.items():
        for seed in seeds:
            predictor = load_predictor(run.folder, method, [seed], device)
            for number, case in enumerate(cases.cases, 1):
                (volume,) = load_volumes([case], predictor.config.spacing)
                found = predict(predictor.models[0], volume, predictor.config.roi, overlap)
                scores = score_case(found, _indices(volume.truth, cases.labels), volume.spacing, cases.labels)
                rows += [{"method": method, "seed": seed, "case": case.name, **score} for score in scores]
                _say(display, f"{method}, seed {seed}", number, len(cases.cases), scores, case.name)
    return rows


def score_predictions(name: str, folder: Path, cases: Cases, display: Display | None = None) -> list[Row]:
    """Score the label maps of a folder, which lie on the grids of the cases' images.

    Args:
        name: What stands in place of the method.
        folder: The label maps, named as the images are.
        cases: Of :func:`find_cases`.
        display: Where progress is shown.

    Returns:
        Rows of :func:`score_case`, with method, seed (empty) and case before the scores.

    Raises:
        FileNotFoundError: A case has no label map.
        ValueError: A label map is damaged, lies on another grid, or has values that are no classes.
    """
    display, rows, files = display or Display(), [], label_maps(folder)
    preparation = Preparation(None, label=True)
    for number, case in enumerate(cases.cases, 1):
        if case.name not in files:
            raise FileNotFoundError(f"{folder / case.name}.nii.gz: no such file; expected the label map of this case")
        check_case(Case(case.name, case.image, files[case.name]), cases.labels)
        data = {"image": load_image([files[case.name]]), "label": load_label(case)}
        data["label"].affine = data["image"].affine  # equal but for rounding, as check_case has seen to
        data = preparation.orient(data)
        found, truth = (_indices(data[key], cases.labels) for key in ("image", "label"))
        scores = score_case(found[0], truth, [float(value) for value in data["label"].pixdim[:3]], cases.labels)
        rows += [{"method": name, "seed": "", "case": case.name, **score} for score in scores]
        _say(display, name, number, len(cases.cases), scores, case.name)
    return rows


def _say(display: Display, what: str, number: int, count: int, scores: Sequence[Row], case: str) -> None:
    dice = ", ".join(f"{score['label']} {100 * score['dice']:.1f}" for score in scores)
    display.say(f"[{number}/{count}] {what}, {case}: Dice {dice}")


def _indices(values: Tensor, labels: Mapping[int, str]) -> Tensor:
    """The index of each label value among those of the classes, int64 and without metadata; ignored ones stay."""
    found = np.asarray(values)
    return torch.from_numpy(np.where(found < 0, IGNORED, np.searchsorted(np.array(list(labels)), found)))


def score_case(found: Tensor, truth: Tensor, spacing: Sequence[float], labels: Mapping[int, str]) -> list[Row]:
    """Scores of one case, a row for each foreground class.

    Args:
        found: (X, Y, Z), predicted class indices.
        truth: (1, X, Y, Z), class indices.
        spacing: Voxel size in mm.
        labels: Class names by value, in the order of the indices.

    Returns:
        label; dice and surface_dice_1mm, 0 to 1; hd95_mm; volume_mm3 and truth_mm3; and their difference as
        volume_error_mm3, and as volume_error_percent of the truth. A score that is not defined is NaN: all but the
        volumes where the truth has no voxel of the class, HD95 also where the prediction has none.
    """
    pair = one_hot_pair(found, truth, len(labels))
    measured = (dice_scores(pair), hd95_scores(pair, spacing), surface_dice_scores(pair, spacing, TOLERANCE))
    voxel = float(np.prod(spacing))
    rows = []
    names = [name for value, name in labels.items() if value]
    for index, (name, dice, hd95, surface) in enumerate(zip(names, *measured, strict=True), 1):
        volume, wanted = (float(part[0, index].sum()) * voxel for part in pair)
        rows.append({
            "label": name, "dice": dice, "hd95_mm": hd95, "surface_dice_1mm": surface,
            "volume_mm3": volume, "truth_mm3": wanted, "volume_error_mm3": volume - wanted,
            "volume_error_percent": 100 * (volume - wanted) / wanted if wanted else float("nan"),
        })  # fmt: skip
    return rows
