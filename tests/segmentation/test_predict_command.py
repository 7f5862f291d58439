"""`tcurlora predict` and `tcurlora evaluate`: from a run to label maps and their scores by commands alone."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def test_from_a_run_to_label_maps_and_scores(finished_run: Path, pristine_data: Path, tmp_path: Path) -> None:
    images, out = pristine_data / "imagesTr", tmp_path / "maps"
    text = run("predict", finished_run, "--input", images, "--output", out, "--seed", "all", "--probabilities")
    lines = text.splitlines()
    assert lines[0].endswith("method tcur (by default; the run also has head), seeds 0, 1, mean of their probabilities")
    assert lines[1].startswith("[1/5] case_000.nii.gz: ")
    assert lines[-1] == f"label maps and volumes.csv: {out}"
    names = sorted(path.name for path in images.iterdir())
    assert sorted(path.name for path in out.glob("*.nii.gz")) == names
    assert sorted(path.name for path in (out / "probabilities").iterdir()) == names
    assert len(list((out / "overlays").glob("*.png"))) == len(read_csv(out / "volumes.csv")) == 5
    text = run("evaluate", "--predictions", out, "--data", pristine_data, "--list", "val")
    assert "surface Dice %" in text
    assert len(read_csv(out / "evaluation/scores.csv")) == 4
    text = run("evaluate", finished_run, "--seed", "0", "--output", tmp_path / "scores")
    assert "head - tcur" in text
    assert max(len(line) for line in text.split("\n\n", 1)[1].splitlines() if "scores:" not in line) <= 80


def test_several_files_after_input_and_an_adapter_file(finished_run: Path, pristine_data: Path, tmp_path: Path) -> None:
    files = sorted((pristine_data / "imagesTr").iterdir())[:3]
    run("predict", finished_run, "--input", *files, "--output", tmp_path / "run", "--no-overlays", "--method", "tcur")
    adapter = finished_run / "tcur/seed0/adapter.safetensors"
    text = run(
        "predict", "--adapter", adapter, "--base", finished_run / "base.safetensors", "--output", tmp_path / "files",
        "--no-overlays", "--input", *files,
    )  # fmt: skip
    assert text.startswith(f"{adapter} (tcur) on ")
    for path in files:
        a, b = (np.asarray(nib.load(tmp_path / name / path.name).dataobj) for name in ("run", "files"))
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "run/overlays").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--input", "SCAN"), "output: found none"),
        (("RUN", "--output", "OUT"), "input: found none"),
        (("--input", "SCAN", "--output", "OUT"), "found no run folder, expected one, or --adapter"),
        (("--adapter", "x", "--input", "SCAN", "--output", "OUT"), "found --adapter without --base"),
        (("--base", "x", "--input", "SCAN", "--output", "OUT"), "found --base without --adapter"),
        (
            ("RUN", "--adapter", "x", "--base", "y", "--input", "SCAN", "--output", "OUT"),
            "found the run folder RUN beside",
        ),
        (("--adapter", "x", "--base", "y", "--seed", "0", "--input", "SCAN", "--output", "OUT"), "found --method or"),
        (("RUN", "--input", "SCAN", "--output", "OUT", "--device", "nonsense"), "device: found 'nonsense'"),
        (("RUN", "--input", "SCAN", "--output", "OUT", "--method", "lora"), "RUN: the method 'lora' was not part"),
        (("RUN", "--input", "nowhere", "--output", "OUT"), "nowhere: no such file or folder"),
    ],
)
def test_wrong_words_end_in_one_line_and_code_2(
    words: tuple[str, ...], message: str, finished_run: Path, pristine_data: Path, tmp_path: Path
) -> None:
    places = {"RUN": finished_run, "SCAN": pristine_data / "imagesTr/case_000.nii.gz", "OUT": tmp_path / "out"}
    done = CliRunner().invoke(app, ["predict", *(str(places.get(word, word)) for word in words)])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message.replace('RUN', str(finished_run))}")
    assert "expected" in line
    assert not (tmp_path / "out").exists()
