"""`tcurlora predict`: label maps of new scans, by the adapted network of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import terminal


def predict(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder of finetune; left out where --adapter and --base are given.")
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SCAN]...", help="Further scans, so that --input *.nii.gz takes all of them."),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="A scan (.nii.gz, .nii, .mha, .nrrd) or a folder of scans; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the label maps, which have the scans' names.")] = None,
    method: Annotated[
        str | None, typer.Option(help="The run's method to take. Default: tcur, else the only or best one.")
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            help="The run's seed to take; several with commas between, or all, for their mean. Default: the first."
        ),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter file to take in place of a run.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base weights of --adapter, with network.json beside them.")
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Overlap of neighbouring windows, as a fraction of the window.")
    ] = 0.25,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the classes' probabilities, float32 (X, Y, Z, class).")
    ] = False,
    overlays: Annotated[bool, typer.Option(help="Draw the contours of each label map on its scan.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again what is there already.")] = False,
    device: options.Device = "auto",
) -> None:
    """Write label maps of new scans, each on the grid and with the header of its scan.

    Scans are prepared as in training. Beside the label maps come volumes.csv, the volume of each structure in mm³, and
    pictures with contours.
    """
    from tcurlora_ext.segmentation.prediction import PredictOptions, predict_scans
    from tcurlora_ext.segmentation.prediction.predictor import load_files, load_predictor
    from tcurlora_ext.segmentation.prediction.scans import find_scans
    from tcurlora_ext.segmentation.runs.pretraining import pick_device
    from tcurlora_ext.segmentation.terminal import Display

    if output is None:
        raise ValueError("output: found none, expected a folder for the label maps")
    scans = [*(inputs or []), *(more or [])]
    display, place = Display(terminal()), pick_device(device)
    if adapter is not None or base is not None:
        if adapter is None or base is None:
            given, other = ("adapter", "base") if base is None else ("base", "adapter")
            raise ValueError(f"found --{given} without --{other}, expected both, or a run folder")
        if method is not None or seed is not None:
            raise ValueError("found --method or --seed beside --adapter, expected them with a run folder alone")
        if run is not None and (run / "run.json").is_file():
            raise ValueError(f"found the run folder {run} beside --adapter, expected one of them")
        scans += [] if run is None else [run]
        scans = [scan.path for scan in find_scans(scans)]  # before networks are loaded
        predictor = load_files(adapter, base, place)
    elif run is None:
        raise ValueError("found no run folder, expected one, or --adapter FILE --base FILE")
    else:
        scans = [scan.path for scan in find_scans(scans)]
        predictor = load_predictor(run, method, seed, place)
    display.say(predictor.title)
    predict_scans(predictor, scans, output, PredictOptions(overlap, probabilities, overlays, overwrite), display)
    display.say(f"label maps and volumes.csv: {output}")
