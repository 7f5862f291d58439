"""Telling groups apart by volumes: those that differ, those that do not, and tables that are refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from .conftest import EXAMPLES, Script, table


@pytest.fixture
def groups_tables(tmp_path: Path) -> tuple[Path, Path]:
    """The example's simulated volumes and subjects as files."""
    made = runpy.run_path(str(EXAMPLES / "volumes_to_groups.py"))["simulated"](60)
    paths = tmp_path / "volumes.csv", tmp_path / "subjects.csv"
    for frame, path in zip(made, paths, strict=True):
        frame.to_csv(path, index=False)
    return paths


def test_volumes_tell_groups_apart_and_permuted_groups_do_not(again: Script, groups_tables: tuple[Path, Path]) -> None:
    volumes, subjects = groups_tables
    found = table(again("volumes_to_groups.py", volumes, subjects, "--permutations", "20", "--repeats", "2"))
    aucs = {
        name: float(cells[0].split()[0])
        for name, cells in found.items()
        if name in ("age and sex", "volumes, adjusted")
    }
    assert aucs["volumes, adjusted"] > max(0.75, aucs["age and sex"])
    assert float(found["volumes, adjusted"][2]) < 0.1
    assert float(found["hippocampus"][0]) < -0.8
    lines = subjects.read_text().splitlines()
    swapped = [
        line.replace("AD", "CN") if index % 4 < 2 else line.replace("CN", "AD") for index, line in enumerate(lines[1:])
    ]
    subjects.write_text("\n".join([lines[0], *swapped]) + "\n")
    found = table(again("volumes_to_groups.py", volumes, subjects, "--permutations", "20", "--repeats", "2"))
    assert float(found["volumes, adjusted"][2]) > 0.05


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (("age", "years"), (), "expected age too"),
        (("CN", "EMCI"), (), "group CN: found 0 scans"),
        (("s001", "s003"), (), "found s003 twice"),
        ((" mm3", " ml"), (), "found no column that ends in ' mm3'"),
        (("", ""), ("--groups", "CN"), "expected two different names"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    change: tuple[str, str], words: tuple[str, ...], message: str, refused: Script, groups_tables: tuple[Path, Path]
) -> None:
    for path in groups_tables:
        path.write_text(path.read_text().replace(*change))
    assert message in " ".join(refused("volumes_to_groups.py", *groups_tables, *words).split())
