"""Two result files side by side: what is called a change, what noise, and what is refused."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from tcurlora_ext.bench.reading.compare import Comparison, compare

from .made_up import row, write


def comparison(folder: Path, a: list[dict[str, str]], b: list[dict[str, str]]) -> Comparison:
    return compare(write(folder / "a.csv", a), write(folder / "b.csv", b))


def verdict(folder: Path, a: dict[str, str], b: dict[str, str]) -> str:
    (pair,) = comparison(folder, [a], [b]).pairs
    return pair.verdict


def test_a_variant_is_judged_by_its_ratio_to_the_frozen_network_not_by_its_time(tmp_path: Path) -> None:
    """On a machine that became slower by a fifth, everything took longer and nothing changed."""
    assert verdict(tmp_path, row("lora", 20.0), row("lora", 24.0, frozen=12.0)) == "noise"
    assert verdict(tmp_path, row("lora", 20.0), row("lora", 20.0, frozen=12.0)) == "faster"
    assert verdict(tmp_path, row("lora", 20.0), row("lora", 23.0)) == "slower"


def test_the_frozen_network_is_judged_by_its_time(tmp_path: Path) -> None:
    assert verdict(tmp_path, row("frozen", 10.0), row("frozen", 11.5, frozen=11.5)) == "slower"
    assert verdict(tmp_path, row("frozen", 10.0), row("frozen", 10.8, frozen=10.8)) == "noise"


def test_intervals_that_overlap_are_noise(tmp_path: Path) -> None:
    assert verdict(tmp_path, row("lora", 20.0, spread=0.08), row("lora", 23.0, spread=0.08)) == "noise"
    assert verdict(tmp_path, row("lora", 20.0, spread=0.05), row("lora", 23.0, spread=0.05)) == "slower"


def test_few_rounds_need_intervals_further_apart(tmp_path: Path) -> None:
    a, b = row("lora", 20.0, spread=0.05), row("lora", 23.0, spread=0.05)
    assert verdict(tmp_path, a | {"rounds": "14"}, b | {"rounds": "14"}) == "slower"
    assert verdict(tmp_path, a | {"rounds": "7"}, b | {"rounds": "7"}) == "noise"


def test_a_small_shift_is_noise_however_narrow_the_intervals(tmp_path: Path) -> None:
    a, b = row("lora", 20.0, spread=0.001), row("lora", 21.5, spread=0.001)
    assert verdict(tmp_path, a, b) == "noise"
    (pair,) = compare(tmp_path / "a.csv", tmp_path / "b.csv", least=0.05).pairs
    assert pair.verdict == "slower"


def test_a_case_whose_frozen_network_jumped_has_a_verdict_for_that_alone(tmp_path: Path) -> None:
    """Beside a busy process ratios change; with another device or torch the frozen network's time may jump."""
    a = [row("frozen", 10.0), row("lora", 20.0), row("lora", 20.0, tokens=64)]
    b = [row("frozen", 40.0, frozen=40.0), row("lora", 120.0, frozen=40.0), row("lora", 30.0, tokens=64)]
    found = comparison(tmp_path, a, b)
    assert [pair.verdict for pair in found.pairs] == ["slower", "disturbed", "slower"]
    assert "2 slower, 1 disturbed, 0 noise" in found.text()
    for column in ("device", "torch"):
        found = comparison(tmp_path, a, [one | {column: "other"} for one in b])
        assert [pair.verdict for pair in found.pairs] == ["slower", "slower", "slower"]


@pytest.mark.parametrize(("rounds", "allowed"), [(5, 0.01), (7, 0.01), (14, 0.01), (20, 0.003)])
def test_the_same_program_twice_is_noise(rounds: int, allowed: float, tmp_path: Path) -> None:
    """Of 2,000 rows whose times have one distribution hardly any is called a change; large shifts are found."""
    chance = random.Random(rounds)

    def measured(index: int, centre: float) -> dict[str, str]:
        ratios = [chance.gauss(centre, 0.1 * centre) for _ in range(rounds)]
        fifths = statistics.quantiles(ratios, n=5, method="inclusive")
        middle = statistics.median(ratios)
        return row("lora", 20.0, case=str(index), rounds=rounds) | {
            "over_frozen_p20": str(fifths[0]), "over_frozen": str(middle), "over_frozen_p80": str(fifths[3]),
        }  # fmt: skip

    a = [measured(index, 2.0) for index in range(2000)]
    same = comparison(tmp_path, a, [measured(index, 2.0) for index in range(2000)])
    assert same.count("noise") >= (1 - allowed) * 2000
    shifted = comparison(tmp_path, a, [measured(index, 3.6) for index in range(2000)])
    assert shifted.count("slower") > 0.9 * 2000
    assert shifted.count("faster") == 0


def test_a_count_that_differs_is_a_change(tmp_path: Path) -> None:
    a = [row("lora", 20.0), row("tcur native", 18.0)]
    b = [row("lora", 20.0, peak_mib="2"), row("tcur native", 18.0, launches="7", saved_mib="")]
    found = comparison(tmp_path, a, b)
    assert [pair.changes for pair in found.pairs] == [
        {"peak_mib": ("1", "2")},
        {"saved_mib": ("1", ""), "launches": ("1", "7")},
    ]
    assert "saved_mib 1 -> none  launches 1 -> 7" in found.text()
    assert "2 with other memory or counts" in found.text()


def test_the_text_lists_what_differs_and_counts_the_rest(tmp_path: Path) -> None:
    a = [row(f"variant {index}", 20.0) for index in range(50)] + [row("lora", 20.0)]
    found = comparison(tmp_path, a, [*a[:-1], row("lora", 30.0)])
    assert "variant 7" not in found.text()
    assert "lora" in found.text()
    assert "1.500" in found.text()
    assert (
        "51 rows in both: 0 faster, 1 slower, 0 disturbed, 50 noise; 0 with other memory or counts (50 rows"
        in found.text()
    )
    assert "variant 7" in found.text(everything=True)
    assert found.text(everything=True).count("unetr out_proj r=8 T=2048") == 1


def test_rows_of_one_file_alone_are_listed(tmp_path: Path) -> None:
    same = row("frozen", 10.0)
    found = comparison(tmp_path, [same, row("lora", 20.0)], [row("tcur native", 18.0), same])
    assert [one["variant"] for one in found.only_a] == ["lora"]
    assert [one["variant"] for one in found.only_b] == ["tcur native"]
    assert "only in A:\n  unetr out_proj r=8 T=2048 training float32, lora" in found.text()


@pytest.mark.parametrize("column", ["stack", "in", "sweep", "tokens", "rank", "mode", "dtype", "case"])
def test_points_of_a_sweep_are_never_compared_with_each_other(column: str, tmp_path: Path) -> None:
    other = row("lora", 20.0) | {column: "3"}
    found = comparison(tmp_path, [row("lora", 20.0), other], [other])
    assert len(found.pairs) == len(found.only_a) == 1


@pytest.mark.parametrize(
    ("column", "before", "after"),
    [("device", "CPU", "H100"), ("torch", "2.6", "2.7"), ("triton", "", "3.6"), ("rounds", "7", "20")],
)
def test_other_devices_and_versions_are_said(column: str, before: str, after: str, tmp_path: Path) -> None:
    found = comparison(tmp_path, [row("lora", 20.0, **{column: before})], [row("lora", 20.0, **{column: after})])
    assert found.notes == [f"{column}: {before or 'none'} in A, {after} in B"]
    assert f"note: {column}" in found.text()


def test_the_same_file_has_no_notes(tmp_path: Path) -> None:
    found = comparison(tmp_path, [row("lora", 20.0)], [row("lora", 20.0)])
    assert (found.notes, found.count("noise")) == ([], 1)


def test_rows_that_failed_are_not_compared_and_named(tmp_path: Path) -> None:
    """A file without the column, as older ones are, beside one with it."""
    failure = row("lora", 20.0) | dict.fromkeys(("median_ms", "over_frozen", "rounds"), "") | {"failure": "Error: no"}
    whole = [row("frozen", 10.0, failure=""), failure]
    found = comparison(tmp_path, [row("frozen", 10.0), row("lora", 20.0)], whole)
    assert [pair.a["variant"] for pair in found.pairs] == ["frozen"]
    assert [one["variant"] for one in found.only_a] == ["lora"]
    assert found.notes == ["failed in B: unetr out_proj r=8 T=2048 training float32, lora: Error: no"]
    with pytest.raises(ValueError, match=r"b\.csv: found 1 rows that failed and no other"):
        comparison(tmp_path, whole, [failure])


def test_times_that_are_missing_get_no_verdict(tmp_path: Path) -> None:
    assert verdict(tmp_path, row("lora", 20.0, over_frozen_p20=""), row("lora", 20.0)) == "no times"


BAD: list[tuple[str | bytes, type[Exception], str]] = [
    ("", ValueError, "found no rows"),
    ("a,b\n1,2\n", ValueError, "found columns a, b, ... without device"),
    (b"\xff\xfe\x00,\n\x81,\x82\n", ValueError, "found no CSV"),
]


@pytest.mark.parametrize(("content", "error", "message"), BAD)
def test_what_is_no_result_file_is_refused_by_name(
    content: str | bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    good = write(tmp_path / "good.csv", [row("lora", 20.0)])
    bad = tmp_path / "bad.csv"
    bad.write_bytes(content.encode() if isinstance(content, str) else content)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(error, match=message) as raised:
            compare(*pair)
        assert str(bad) in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", [row("lora", 20.0)])
    with pytest.raises(FileNotFoundError, match=r"missing\.csv: no such file"):
        compare(good, tmp_path / "missing.csv")
    with pytest.raises(OSError, match=str(tmp_path)):
        compare(tmp_path, good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_ms": "fast"}, "found 'fast' as median_ms of unetr out_proj"),
        ({"over_frozen": "0"}, "found '0' as over_frozen .* expected a number above 0"),
        ({"over_frozen": "nan"}, "found 'nan' as over_frozen"),
        ({"rounds": "0"}, "found '0' as rounds"),
    ],
)
def test_a_damaged_row_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", [row("lora", 20.0)])
    with pytest.raises(ValueError, match=rf"bad\.csv: {message}"):
        compare(good, write(tmp_path / "bad.csv", [row("lora", 20.0) | change]))


def test_a_row_twice_and_a_row_cut_short_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", [row("lora", 20.0)])
    with pytest.raises(ValueError, match=r"found unetr out_proj .* lora twice"):
        compare(good, write(tmp_path / "bad.csv", [row("lora", 20.0)] * 2))
    text = good.read_text()
    good.write_text(text[: len(text) - 20])
    with pytest.raises(ValueError, match="row 2: found more or fewer cells"):
        compare(good, good)
