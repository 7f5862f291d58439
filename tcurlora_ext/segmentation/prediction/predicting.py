"""Label maps of new scans, each on its own grid: one scan after the other, with nothing kept from one to the next.

    prediction.json        what the label maps were made with
    volumes.csv            mm³ of each structure, one row for each scan
    overlays/<name>.png    contours on the scan
    probabilities/<name>   (X, Y, Z, class) float32, only where they are asked for
    <name>                 label map: NIfTI with the scan's affine and header

A label map is written after everything else of its scan: a scan that has one is finished.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.records import read_csv, read_json, write_csv, write_json
from tcurlora_ext.segmentation.dataset.preparation import Preparation
from tcurlora_ext.segmentation.metrics.evaluation import OVERLAP, class_maps, class_probabilities, most_probable
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.prediction.predictor import Predictor
from tcurlora_ext.segmentation.prediction.scans import (
    Scan,
    find_scans,
    read_scan,
    to_file_order,
    warn_of_channels,
    write_volume,
)
from tcurlora_ext.segmentation.report.overlays import draw_contours
from tcurlora_ext.segmentation.terminal import Display

Row = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """A prediction on the grid of a scan's file.

    Attributes:
        labels: (X, Y, Z), values of the data set's labels, in the smallest unsigned dtype that holds them.
        probabilities: (X, Y, Z, classes) float32, or None where they were not asked for.
        affine: (4, 4), of the scan.
        grey: (X', Y', Z'), the first channel oriented to RAS, for pictures.
        oriented: (X', Y', Z'), the labels on that grid.
        spacing: Voxel size of that grid in mm.
    """

    labels: NDArray[Any]
    probabilities: NDArray[np.float32] | None
    affine: NDArray[np.float64]
    grey: NDArray[np.float32]
    oriented: NDArray[Any]
    spacing: tuple[float, ...]


def predict_image(
    predictor: Predictor, image: Tensor, *, overlap: float = OVERLAP, probabilities: bool = False, name: object = "scan"
) -> Prediction:
    """Predict one scan: prepared as in training, predicted by windows, and brought back to its own grid.

    Args:
        predictor: The networks.
        image: (C, X, Y, Z) with the affine of MONAI, as :func:`~tcurlora_ext.segmentation.prediction.scans.read_scan`
            returns it.
        overlap: Of neighbouring windows, from 0 to below 1.
        probabilities: Whether to return them too.
        name: Of the scan, for an error.

    Raises:
        ValueError: The scan's intensities overflow float32 when they are normalised.
    """
    preparation = Preparation(predictor.config.spacing, label=False)
    affine = np.asarray(image.affine, dtype=np.float64)  # type: ignore[attr-defined]
    oriented: Any = preparation.orient({"image": image})["image"]
    prepared = preparation.prepare({"image": oriented}, name)["image"]
    found = class_probabilities(predictor.models, prepared, predictor.config.roi, overlap)
    maps = class_maps(found, prepared, oriented)
    kept = list(maps) if probabilities else []
    values = np.array(list(predictor.labels))
    values = values.astype(np.min_scalar_type(values.max()))
    labels = values[most_probable(kept or maps).numpy()]
    return Prediction(
        to_file_order(labels, affine),
        to_file_order(np.stack([values.numpy() for values in kept], axis=-1), affine) if kept else None,
        affine, np.asarray(oriented[0]), labels, tuple(float(length) for length in oriented.pixdim[:3]),
    )  # fmt: skip


@dataclass(frozen=True)
class PredictOptions:
    """How scans are predicted and what is written of them.

    Attributes:
        overlap: Of neighbouring windows, as a fraction of the window.
        probabilities: Whether to write the classes' probabilities.
        overlays: Whether to draw contours on each scan.
        overwrite: Whether to predict scans again that have a label map.
    """

    overlap: float = OVERLAP
    probabilities: bool = False
    overlays: bool = True
    overwrite: bool = False


def predict_scans(
    predictor: Predictor, inputs: Sequence[Path], out: Path, options: PredictOptions | None = None,
    display: Display | None = None,
) -> list[Row]:  # fmt: skip
    """Predict files and folders of scans, and write label maps, volumes and pictures to a folder.

    Args:
        predictor: Of :func:`~tcurlora_ext.segmentation.prediction.predictor.load_predictor`, for example.
        inputs: Files and folders.
        out: The folder to write to; label maps have the scans' names in it.
        options: The defaults where None.
        display: Where progress is shown.

    Returns:
        The rows of volumes.csv.

    Raises:
        ValueError, FileNotFoundError: Inputs, folder or options are wrong: raised before anything is written. Or a
            scan cannot be predicted: the others are, and the error then names each that is not.
    """
    options, display = options or PredictOptions(), display or Display()
    if not 0 <= options.overlap < 1:
        raise ValueError(f"overlap: found {options.overlap}, expected a number from 0 to below 1")
    if options.overlays:
        require_package("matplotlib")
    scans = find_scans([Path(path) for path in inputs], predictor.config.in_channels)
    if predictor.config.in_channels == 1:
        warn_of_channels(scans)
    origin = {"source": predictor.title, **predictor.origin, "overlap": options.overlap}
    alike = _check_output(out, scans, origin, options.overwrite)
    rows = _earlier_rows(out / "volumes.csv") if alike else {}
    failures = []
    for number, scan in enumerate(scans, 1):
        place = f"[{number}/{len(scans)}] {scan.path.name}"
        if not options.overwrite and all(path.is_file() for path in _files(out, scan, options)) and scan.name in rows:
            display.say(f"{place}: is there, skipped")
            continue
        start = time.perf_counter()
        try:
            prediction = _predict_file(predictor, scan, options)
        except ValueError as error:
            failures.append(str(error))
            display.say(f"{place}: not predicted")
            continue
        row = volumes(scan.name, prediction, predictor.labels)
        _record(out, origin, alike)
        alike = True
        _write(out, scan, prediction, predictor.labels, options)
        rows[scan.name] = row
        write_csv(out / "volumes.csv", list(rows.values()))
        display.say(f"{place}: {time.perf_counter() - start:.1f} s, {_text(row)}")
        del prediction  # before the next scan is read
    if failures:
        rest = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
        count = f"{len(failures)} of {len(scans)} scans are not predicted: " if len(scans) > 1 else ""
        raise ValueError(count + "; ".join(failures[:5]) + rest)
    return list(rows.values())


def _record(out: Path, origin: dict[str, Any], alike: bool) -> None:
    """Write prediction.json unless it is there; `alike` says whether volumes.csv is of label maps made alike."""
    if not alike:
        (out / "volumes.csv").unlink(missing_ok=True)
    if not alike or read_json(out / "prediction.json") != origin:
        write_json(out / "prediction.json", origin)


def _predict_file(predictor: Predictor, scan: Scan, options: PredictOptions) -> Prediction:
    image = read_scan(scan.path, predictor.config.in_channels, scan.others)
    return predict_image(
        predictor, image, overlap=options.overlap, probabilities=options.probabilities, name=scan.path
    )  # fmt: skip


def _files(out: Path, scan: Scan, options: PredictOptions) -> list[Path]:
    """The files that are written of a scan, its label map last."""
    extra = [out / "probabilities" / scan.output] if options.probabilities else []
    return [*extra, *([out / "overlays" / f"{scan.name}.png"] if options.overlays else []), out / scan.output]


def _write(
    out: Path, scan: Scan, prediction: Prediction, labels: dict[int, str], options: PredictOptions
) -> None:  # fmt: skip
    if prediction.probabilities is not None:
        write_volume(out / "probabilities" / scan.output, prediction.probabilities, scan.path, prediction.affine)
    if options.overlays:
        draw_contours(
            out / "overlays" / f"{scan.name}.png", prediction.grey, prediction.oriented, prediction.spacing, labels,
            scan.name,
        )  # fmt: skip
    write_volume(out / scan.output, prediction.labels, scan.path, prediction.affine)


def volumes(name: str, prediction: Prediction, labels: dict[int, str]) -> Row:
    """A row of volumes.csv: mm³ of each foreground class."""
    voxel = float(abs(np.linalg.det(prediction.affine[:3, :3])))
    count = {value: int((prediction.labels == value).sum()) for value in labels if value}
    return {"case": name} | {f"{labels[value]} mm3": round(number * voxel, 3) for value, number in count.items()}


def _text(row: Row) -> str:
    return ", ".join(f"{key.removesuffix(' mm3')} {value:,.0f} mm³" for key, value in row.items() if key != "case")


def _earlier_rows(path: Path) -> dict[str, Row]:
    return {str(row["case"]): dict(row) for row in read_csv(path)} if path.is_file() else {}


# What differs, in words, where an entry of prediction.json does.
_MADE_WITH = {
    "base_sha256": "other base weights", "adapters_sha256": "other adapters", "labels": "other classes",
    "overlap": "another overlap",
}  # fmt: skip


def _check_output(out: Path, scans: Sequence[Scan], origin: dict[str, Any], overwrite: bool) -> bool:
    """Raise ValueError unless label maps of these scans may be written to the folder, beside those in it.

    Returns:
        Whether those in it were made as these will be, so that the rows of volumes.csv stay.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: found a file, expected a folder or nothing")
    for scan in scans:
        if any((out / scan.output).resolve() == path.resolve() for path in (scan.path, *scan.others)):
            raise ValueError(f"{out}: the label map of {scan.path} would replace the scan, expected another folder")
    record = out / "prediction.json"
    if not record.is_file():
        there = next((scan.output for scan in scans if (out / scan.output).exists()), None)
        if there is not None and not overwrite:
            raise ValueError(f"{out}: found {there} but no prediction.json, expected another folder, or --overwrite")
        return False
    earlier = read_json(record)
    made = [key for key in origin if key != "source"]  # the same weights may lie elsewhere
    changed = [key for key in made if not isinstance(earlier, dict) or earlier.get(key) != origin[key]]
    if not changed:
        return True
    others = sorted(set(_earlier_rows(out / "volumes.csv")) - {scan.name for scan in scans})
    if not overwrite or others:
        beside = f" for all scans in it ({others[0]} is not among these)" if others else ""
        raise ValueError(
            f"{record}: the label maps in this folder were made with {_MADE_WITH[changed[0]]} than now; expected "
            f"another folder, or --overwrite{beside}"
        )
    return False
