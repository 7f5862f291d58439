"""Tables of the docs: made from the files alone, refused where they cannot be, and up to date as committed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tcurlora_ext.bench.names import DENSE, TRANSIENT
from tcurlora_ext.bench.reading.tables import TABLES, fill, main, outdated

from .made_up import row, sweep, write

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_committed_pages_are_what_their_files_give() -> None:
    stale = outdated(PAGES, ROOT)
    assert not stale, (
        f"python -m tcurlora_ext.bench.reading.tables README.md docs/*.md brings up to date: {list(stale)}"
    )


def page(name: str, file: str = "quick.csv") -> str:
    return f"before\n\n<!-- table: {name} {file} -->\n<!-- end -->\n\nafter\n"


def quick() -> list[dict[str, str]]:
    rows = [
        row("frozen", 10.0), row("lora", 25.0, over_lora=1), row("peft lora r=32", 14.0),
        row("tcur eager", 22.0), row("tcur native", 20.0, over_lora=0.8, over_peft_r32=1.4286, share_of_limit=0.456),
    ]  # fmt: skip
    network = {"case": "unetr encoder", "network": "encoder", "q": "", "in": "", "out": "", "stack": "", "slices": ""}
    return rows + [
        one | network | {"tokens": "512", "extra_peak_mib": "1234.5", "saved_mib": "", "trained": "4608"}
        for one in rows
    ]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", ["layers", "over_frozen"])
def test_a_row_that_failed_is_left_out_and_named_below_the_table(name: str, tmp_path: Path) -> None:
    """A variant of one case, and a whole case."""
    empty = dict.fromkeys(("rounds", "p20_ms", "median_ms", "p80_ms", "over_frozen", "over_lora"), "")
    measured = [one | {"failure": ""} for one in quick() if one["network"] == "layer"]
    failed = [
        row("tcur compiled", 1.0) | empty | {"failure": "Error: no"},
        row("frozen", 1.0, tokens=4) | empty | {"failure": "OutOfMemoryError: no"},
    ]
    write(tmp_path / "quick.csv", [*measured, *failed])
    filled = fill(page(name), tmp_path)
    assert "Failed, and left out:\n\n- unetr out_proj r=8 T=2048 training float32, tcur compiled: Error: no\n" in filled
    assert "- unetr out_proj r=8 T=4 training float32, frozen: OutOfMemoryError: no\n\n<!-- end -->" in filled
    (tmp_path / "without").mkdir()
    write(tmp_path / "without" / "quick.csv", measured)
    assert cells(filled) == cells(fill(page(name), tmp_path / "without"))
    (tmp_path / "page.md").write_text(filled)
    assert not outdated([tmp_path / "page.md"], tmp_path)


def test_one_row_per_case_with_what_it_is_compared_with(tmp_path: Path) -> None:
    write(tmp_path / "quick.csv", quick())
    header, _, layer, network = cells(fill(page("layers"), tmp_path))
    assert header[1:6] == [
        "q",
        "frozen, ms",
        "LoRA of rank q / frozen",
        "PEFT LoRA r=32 / frozen",
        "tcur native / frozen",
    ]
    assert layer == [
        "unetr out_proj T=2048",
        "384",
        "10",
        "2.50",
        "1.40",
        "2.00",
        "1.98 to 2.02",
        "0.80",
        "1.43",
        "46 %",
    ]
    assert network[:3] == ["unetr encoder T=512", "", "10"]


def test_what_the_cases_have_in_common_and_the_origin_are_below(tmp_path: Path) -> None:
    write(tmp_path / "quick.csv", quick())
    (line,) = (line for line in fill(page("layers"), tmp_path).splitlines() if "quick.csv`" in line)
    assert "measured by `tcurlora bench`; r=8, training, float32; device; 20 rounds; torch torch" in line


def test_one_column_per_case(tmp_path: Path) -> None:
    write(tmp_path / "quick.csv", quick())
    assert cells(fill(page("over_frozen"), tmp_path))[0] == ["", "unetr out_proj T=2048", "unetr encoder T=512"]
    assert cells(fill(page("over_frozen"), tmp_path))[-1] == ["tcur native", "2.00", "2.00"]
    assert cells(fill(page("share_of_limit"), tmp_path))[-1] == ["tcur native", "46 %", "46 %"]


def test_memory_is_that_of_networks(tmp_path: Path) -> None:
    write(tmp_path / "quick.csv", quick())
    _, _, first, second, *_ = cells(fill(page("memory"), tmp_path))
    assert first == ["unetr encoder T=512", "frozen", "1,234", "", "1", "4,608", "1"]
    assert second[:2] == ["", "lora"]


def test_growth_has_one_row_per_point(tmp_path: Path) -> None:
    write(tmp_path / "growth.csv", sweep())
    table = cells(fill(page("growth-tokens", "growth.csv"), tmp_path))
    assert table[0] == [
        "T", "frozen, ms", "lora", "tcur native", DENSE, TRANSIENT,
        "MiB: lora", "MiB: tcur native", f"MiB: {DENSE}", f"MiB: {TRANSIENT}",
    ]  # fmt: skip
    assert [line[0] for line in table[2:]] == ["100", "300", "500", "1,600"]
    assert table[-1][:4] == ["1,600", "16", "", "2.00 (2.00)"]
    inference = cells(fill(page("growth-tokens-inference", "growth.csv"), tmp_path))
    assert not any(TRANSIENT in cell for cell in inference[0])


def test_crossovers_and_never(tmp_path: Path) -> None:
    write(tmp_path / "growth.csv", sweep())
    table = {line[0]: line[1:] for line in cells(fill(page("crossover", "growth.csv"), tmp_path))}
    assert table["transient, training"] == ["none to 1,600", "never", "1,152"]
    assert table["dense layer, inference"][1:] == ["300", "384"]
    assert table["merged once, inference: tokens in all"] == ["400", "", "384"]


def test_host_times_need_their_own_columns_alone(tmp_path: Path) -> None:
    (tmp_path / "host.csv").write_text("variant,median_us,least_us\ntcur native,12.0,11.5\n")
    text = fill(page("host", "host.csv"), tmp_path)
    assert cells(text)[-1] == ["tcur native", "12.0", "11.5"]
    with pytest.raises(ValueError, match=r"host\.csv: found columns .* without device"):
        fill(page("layers", "host.csv"), tmp_path)


def test_every_table_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    """Twice the same is the same, and new numbers take the place of the old."""
    write(tmp_path / "quick.csv", quick())
    text = page("layers") + page("memory")
    once = fill(text, tmp_path)
    assert fill(once, tmp_path) == once
    assert once.startswith("before\n\n<!-- table: layers quick.csv -->\n")
    assert once.endswith("<!-- end -->\n\nafter\n")
    assert re.sub(r"(table: .*? -->\n).*?(<!-- end)", r"\1\2", once, flags=re.S) == text
    write(tmp_path / "quick.csv", [one | {"over_lora": "0.77"} for one in quick()])
    assert fill(once, tmp_path) != once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: layers quick.csv -->\n", "found 1 markers in 0 pairs"),
        ("<!-- table: layers quick.csv -->\n" + page("memory"), "found 3 markers in 1 pairs"),
        ("<!-- end -->\n", "found 1 markers in 0 pairs"),
        ("  <!-- table: layers quick.csv -->\n  <!-- end -->\n", "found 2 markers in 0 pairs"),
        (page("speed"), "found table 'speed quick.csv', expected a file and before it one of layers, over_frozen"),
        (page("layers", ""), "found table 'layers"),
    ],
)
def test_a_marker_that_makes_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "quick.csv", quick())
    with pytest.raises(ValueError, match=message):
        fill(text, tmp_path)


def test_the_command_writes_or_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "quick.csv", quick())
    (tmp_path / "page.md").write_text(page("layers"))
    assert main(["--check", "page.md"]) == 1
    assert (tmp_path / "page.md").read_text() == page("layers")
    assert main(["page.md"]) == 0
    assert main(["--check", "page.md"]) == 0
    assert "page.md: written" in capsys.readouterr().out
    (tmp_path / "quick.csv").unlink()
    assert main(["--check", "page.md"]) == 2
    assert "quick.csv: no such file" in capsys.readouterr().err


def test_every_kind_of_table_is_used() -> None:
    """The docs show each kind once at least, so that none is there for nothing."""
    used = {found for path in PAGES for found in re.findall(r"^<!-- table: (\S+)", path.read_text(), re.M)}
    assert used == set(TABLES)
