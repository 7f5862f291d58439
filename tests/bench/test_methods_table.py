"""The table of a run of several methods, from its metrics.csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcurlora_ext.bench.reading.methods import methods_table, title
from tcurlora_ext.bench.reading.tables import fill
from tcurlora_ext.io.records import write_csv


def row(method: str, seed: int, dice: float, trained: int, warm_up: int = 0) -> dict[str, str]:
    return {
        "method": method, "seed": str(seed), "trained_numbers": str(trained), "dice": str(dice), "hd95_mm": "3",
        "warm_up_steps": str(warm_up), "adapter_bytes": "4000", "seconds": "1",
    }  # fmt: skip


ROWS = [
    row("head", 0, 0.66, 34), row("lora", 0, 0.72, 98338), row("lora", 1, 0.74, 98338),
    row("tcur-learned", 0, 0.715, 2338, 60), row("tcur-learned", 1, 0.745, 2338, 60),
    row("tcur-carried:factors=carried:rank=4", 1, 0.74, 610),
]  # fmt: skip


def test_differences_are_taken_seed_by_seed() -> None:
    table = methods_table(ROWS)
    assert table[1:] == [
        ["output head alone", "0", "4.0", "", "1", "66.0", "-6.00"],
        ["LoRA r=8", "98,304", "4.0", "", "2", "73.0 ± 1.4", ""],
        ["learned r=8", "2,304", "4.0", "60", "2", "73.0 ± 2.1", "+0.00 ± 0.71"],
        ["carried r=4", "576", "4.0", "", "1", "74.0", "+0.00"],
    ]
    assert all(len(line) == len(table[0]) for line in table)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", "LoRA r=8"),
        ("lora:bits=4", "LoRA r=8, 4 bits an entry"),
        ("tcur-learned:bits=1", "learned r=8, 1 bit an entry"),
        ("tcur-learned:warm_up=120:bits=32", "learned r=8, 120 steps of warm-up, 32 bits an entry"),
        ("tcur-carried:factors=carried", "carried r=8"),
        ("tcur-carried:factors=whole:rank=16", "carried from whole r=16"),
        ("adalora", "AdaLoRA r=8"),
        ("pissa:rank=4", "PiSSA r=4"),
        ("hyps:width=4:rank=2", "HyPS r=2, width 4"),
        ("adalora:rank=4", "AdaLoRA r=4"),
    ],
)
def test_titles(method: str, expected: str) -> None:
    assert title(method) == expected


def test_a_page_gets_it_with_its_origin(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", ROWS)
    text = fill("<!-- table: methods metrics.csv -->\n<!-- end -->\n", tmp_path)
    assert "| learned r=8 | 2,304 | 4.0 | 60 | 2 | 73.0 ± 2.1 | +0.00 ± 0.71 |" in text
    assert "`metrics.csv`, measured by `python -m tcurlora_ext.bench.learned`." in text
