"""Figures: drawn from result files alone, the same bytes for the same numbers, and up to date as committed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tcurlora_ext.bench.cases import SETS
from tcurlora_ext.bench.reading.plot import draw, main, source
from tcurlora_ext.bench.reading.styles import style, styles
from tcurlora_ext.bench.variants import variants
from tcurlora_ext.io.records import write_csv

from .made_up import row, sweep, write

ROOT = Path(__file__).parents[2]
FIGURES = sorted((ROOT / "docs" / "figures").glob("*/*.png"))


def results(folder: Path) -> Path:
    """Results of two devices: one with both files, one with growth alone."""
    quick = [row(name, 10.0 + index) for index, name in enumerate(styles())]
    quick += [
        one | {"case": "unetr encoder", "network": "encoder", "saved_mib": str(i + 1)} for i, one in enumerate(quick)
    ]
    grown = [
        *sweep(),
        *(one | {"sweep": "rank", "rank": one["tokens"]} for one in sweep() if one["mode"] == "training"),
    ]
    write(folder / "results" / "cpu" / "quick.csv", quick)
    write(folder / "results" / "cpu" / "growth.csv", grown)
    write(folder / "results" / "gpu" / "growth.csv", sweep())
    compared = [
        {"method": name, "trained_numbers": "9" * size, "dice_mean": f"0.7{size}", "dice_sd": "0.01"}
        for size, name in enumerate(("lora", "tcur"), 2)
    ]
    write_csv(folder / "results" / "segmentation" / "comparison-small" / "summary.csv", compared)
    return folder / "results"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results/ and the pictures/ of them."""
    folder = tmp_path_factory.mktemp("drawn")
    draw(results(folder), folder / "pictures")
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_a_figure_for_every_device_and_file(drawn: Path) -> None:
    found = pictures(drawn / "pictures")
    assert sorted(found) == [
        "comparison-small/parameters.png", "cpu/growth.png", "cpu/quick-memory.png", "cpu/quick-time.png",
        "gpu/growth.png",
    ]  # fmt: skip
    for name in found:
        with Image.open(drawn / "pictures" / name) as picture:
            assert picture.width == (1280 if name.startswith("comparison") else 1080)


def test_the_same_numbers_give_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):  # as a user's settings would
        draw(drawn / "results", tmp_path)
    assert pictures(tmp_path) == pictures(drawn / "pictures")


def test_other_numbers_give_another_picture(drawn: Path, tmp_path: Path) -> None:
    write(tmp_path / "results" / "gpu" / "growth.csv", [one | {"peak_mib": "7"} for one in sweep()])
    draw(tmp_path / "results", tmp_path)
    assert pictures(tmp_path)["gpu/growth.png"] != pictures(drawn / "pictures")["gpu/growth.png"]


def test_a_row_that_failed_is_not_drawn_and_named_once(tmp_path: Path) -> None:
    rows = [row(name, 10.0, failure="") for name in ("frozen", "lora", "tcur eager")]
    empty = dict.fromkeys(("rounds", "p20_ms", "median_ms", "over_frozen", "saved_mib"), "")
    path = write(tmp_path / "results" / "cpu" / "quick.csv", [*rows, row("tcur native", 1.0, failure="no") | empty])
    logged: list[str] = []
    written = draw(tmp_path / "results", tmp_path / "pictures", logged.append)
    assert [name.name for name in written] == ["quick-time.png", "quick-memory.png"]
    assert logged == [f"{path}: failed, not drawn: unetr out_proj r=8 T=2048 training float32, tcur native: no"]


def test_a_picture_says_what_it_was_drawn_from(drawn: Path) -> None:
    with Image.open(drawn / "pictures" / "gpu" / "growth.png") as picture:
        assert picture.info["Source"] == source(drawn / "results" / "gpu" / "growth.csv")
        assert "Software" not in picture.info
        assert "Creation Time" not in picture.info


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_committed_figures_are_of_the_committed_results(figure: Path) -> None:
    with Image.open(figure) as picture:
        said = picture.info["Source"]
    (path,) = (ROOT / "bench" / "results").rglob(said.split(" ")[0])
    assert said == source(path), f"python -m tcurlora_ext.bench.reading.plot draws {figure} anew"


def test_every_variant_has_a_style_of_its_own() -> None:
    import torch

    assert len(set(styles().values())) == len(styles())
    for variant in variants(torch.device("cpu")):
        style(variant.name)
    with pytest.raises(ValueError, match="found variant 'unknown', expected one with a style: frozen"):
        style("unknown")


def test_there_is_a_panel_for_every_sweep() -> None:
    from tcurlora_ext.bench.reading.plot import PANELS

    assert {(case.sweep, case.mode) for case in SETS["growth"]()} == {panel[:2] for panel in PANELS}


def test_what_cannot_be_drawn_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "found no */quick.csv" in capsys.readouterr().err
    write(tmp_path / "results" / "cpu" / "growth.csv", [row("lora", 1.0)])
    assert main([str(tmp_path / "results"), "--output", str(tmp_path)]) == 2
    assert "growth.csv: found no row of a sweep" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
