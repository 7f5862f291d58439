"""The ablations: their groups, what is collected of finished runs, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("peft")

from tcurlora_ext.bench import ablations
from tcurlora_ext.bench.ablations import BASE, GROUPS, collect
from tcurlora_ext.bench.learned import Cases, Setting
from tcurlora_ext.bench.reading.tables import fill
from tcurlora_ext.io.records import read_csv, read_json, write_csv, write_json
from tcurlora_ext.segmentation.methods import get_methods
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display


def finished(work: Path, group: str, method: str, seed: int, dice: list[float], trained: int = 30) -> None:
    """What a run leaves of a method and seed."""
    (one,) = get_methods([method])
    folder = work / group / one.folder / f"seed{seed}"
    write_csv(folder / "cases.csv", [{"case": f"c{n}", "dice one": value} for n, value in enumerate(dice)])
    row = {"method": one.name, "seed": seed, "trained_numbers": trained, "dice": sum(dice) / len(dice)}
    write_json(folder / "result.json", row)
    for name in ("summary.csv", "metrics.csv"):
        write_csv(work / group / name, [row])
    write_json(work / group / "transformer.json", {})
    settings = {"data": "/far/away/data", "pretrained": None, "methods": [method]}
    write_json(work / group / "run.json", {"settings": settings})


def test_every_group_changes_one_thing_and_its_names_are_methods() -> None:
    names = [name.format("folder") for group in GROUPS for name in group.methods]
    assert len(get_methods(dict.fromkeys(names))) == len(set(names))
    for group in GROUPS:
        assert group.base == BASE or group.base in [m.name for m in get_methods([n.format("f") for n in group.methods])]
    varied = {name.split(":")[1].split("=")[0] for name in names if name.startswith(f"{BASE}:")}
    assert varied >= {"selection", "rank", "stack_by", "orthonormal", "scale", "transform", "core_domain",
                      "frequencies", "order", "norms"}  # fmt: skip


def test_differences_are_paired_over_seeds_and_cases(tmp_path: Path) -> None:
    for seed, shift in ((0, 0.0), (1, 0.02)):
        finished(tmp_path, "base", "head", seed, [0.5, 0.5], 10)
        finished(tmp_path, "base", "tcur", seed, [0.6 + shift, 0.7 + shift])
        finished(tmp_path, "rank", "tcur:rank=4", seed, [0.64 + shift, 0.70 + 2 * shift])
    finished(tmp_path, "learned", "tcur-learned:bits=1", 0, [0.6, 0.6])
    finished(tmp_path, "decoder", "tcur", 0, [0.8, 0.8])
    rows = {(row["group"], row["method"]): row for row in collect(tmp_path, tmp_path / "results")}
    assert list(rows) == [("base", "head"), ("base", "tcur"), ("rank", "tcur:rank=4"), ("decoder", "tcur"),
                          ("learned", "tcur-learned:bits=1")]  # fmt: skip
    row = rows["rank", "tcur:rank=4"]
    assert (row["seeds"], row["trained_beside_head"]) == (2, 20)
    assert row["difference"] == pytest.approx(0.025)
    assert row["difference_sd"] == pytest.approx(0.01 / 2**0.5)
    assert (row["low"], row["high"]) == pytest.approx((0.01, 0.04))
    assert rows["base", "tcur"]["difference"] == rows["learned", "tcur-learned:bits=1"]["difference"] == ""
    assert rows["decoder", "tcur"]["difference"] == pytest.approx(0.15)
    assert len(read_csv(tmp_path / "results" / "metrics.csv")) == 8
    run = read_json(tmp_path / "results" / "run.json")
    assert run["settings"]["data"] == "data"
    assert run["groups"]["rank"] == ["tcur:rank=4"]
    text = fill("<!-- table: ablations results/summary.csv -->\n<!-- end -->\n", tmp_path)
    assert "| rank | `rank=4` | 20 | 2 | 68.5 ± 2.1 | +2.50 ± 0.71 | +1.00 to +4.00 |" in text
    assert "| decoder trained too | `tcur` | 20 | 1 | 80.0 | +15.00 | +10.00 to +20.00 |" in text
    assert "measured by `python -m tcurlora_ext.bench.ablations`." in text


def test_words_choose_groups_and_a_broken_run_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path / "base", *(Cases(tmp_path, "train", "val"),) * 3, {})
    monkeypatch.setattr(ablations, "hippocampus_setting", lambda *_: setting)
    ran: list[tuple[str, tuple[str, ...], str | None]] = []

    def run(settings: FinetuneSettings, folder: Path, display: Display) -> None:
        if folder.name == "decoder":
            raise ValueError("out of luck")
        ran.append((folder.name, settings.methods, settings.also_train))
        for name in settings.methods:
            finished(folder.parent, folder.name, name, 0, [0.6, 0.7])

    monkeypatch.setattr(ablations, "run_methods", run)
    arguments = [str(tmp_path), str(tmp_path / "results"), "--maps", "maps", "--data", "data"]
    assert ablations.main([*arguments, "--only", "stack_by,rank=3,decoder"]) == 2
    assert ran == [
        ("base", ("head", "tcur"), None), ("rank", ("tcur:rank=32",), None),
        ("grouping", ("tcur:stack_by=none", "tcur:stack_by=role"), None),
    ]  # fmt: skip
    assert [row["group"] for row in read_csv(tmp_path / "results" / "summary.csv")] == [
        "base", "base", "rank", "grouping", "grouping"
    ]  # fmt: skip
