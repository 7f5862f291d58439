"""The runner and its files: rows say what was measured, a set is written as it goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tcurlora_ext.bench import results
from tcurlora_ext.bench.cases import Case
from tcurlora_ext.bench.devices import ceilings, device_name, folder_name
from tcurlora_ext.bench.host import host_times
from tcurlora_ext.bench.results import selected, write_host, write_set
from tcurlora_ext.bench.run import Row, run
from tcurlora_ext.io.records import read_csv

CPU = torch.device("cpu")


def rows_of(case: Case, names: tuple[str, ...]) -> list[Row]:
    (rows,) = run([case], CPU, 3, lambda variant, _: variant.name in names, print)
    return rows


def test_rows_say_what_was_measured(case: Case) -> None:
    rows = rows_of(case, ("tcur native", "peft lora r=32"))
    names = [row["variant"] for row in rows]
    assert names[:2] == ["frozen", "lora"]
    assert set(names) >= {"frozen", "lora", "peft lora r=32"}
    assert "tcur dense layer" not in names
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["over_peft_r32"]) > 0
        assert float(row["gflop"]) > 0
        assert row["q"] == 24
        assert float(row["share_of_limit"]) == max(float(row["share_of_flops"]), float(row["share_of_bytes"]))
    frozen, lora = rows[0], rows[1]
    assert frozen["over_frozen"] == frozen["over_frozen_p80"] == lora["over_lora"] == "1"
    assert (frozen["extra_over_lora"], frozen["extra_peak_mib"], frozen["trained"]) == ("", "0", 0)
    assert lora["trained"] == 24 * (24 + 48)


def test_a_variant_that_is_not_run_has_no_ratio(case: Case) -> None:
    assert {row["over_peft_r32"] for row in rows_of(case, ())} == {""}


def test_a_case_beyond_the_memory_is_skipped_and_logged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: Case, device: torch.device) -> None:
        raise torch.OutOfMemoryError

    logged: list[str] = []
    monkeypatch.setattr("tcurlora_ext.bench.run.build", build)
    assert not list(run([case], CPU, 2, lambda variant, _: True, logged.append))
    assert logged == ["fused r=2 T=32 training float32: skipped, cpu has too little memory for it"]


def test_ceilings_are_those_of_a_product_and_a_copy() -> None:
    found = ceilings(torch.float32, CPU)
    assert found.limit(found.flops, 0) == pytest.approx(1)
    assert found.limit(found.flops, 2 * found.bytes) == pytest.approx(2)


def test_a_set_is_written_with_versions_and_some_cases_replace_their_rows(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = replace(case, rank=1)
    monkeypatch.setitem(results.SETS, "small", lambda: [case, other])
    path = write_set("small", CPU, tmp_path, rounds=2, keep=lambda variant, _: False)
    assert path == tmp_path / folder_name(device_name(CPU)) / "small.csv"
    first = read_csv(path)
    assert [(row["rank"], row["variant"]) for row in first] == [
        ("2", "frozen"), ("2", "lora"), ("1", "frozen"), ("1", "lora")
    ]  # fmt: skip
    assert {row["torch"] for row in first} == {torch.__version__}
    assert all(row["commit"] and row["device"] == device_name(CPU) for row in first)
    write_set("small", CPU, tmp_path, [case], rounds=3, keep=lambda variant, _: False)
    again = read_csv(path)
    assert again[2:] == first[2:]
    assert [(row["rank"], row["rounds"]) for row in again[:2]] == [("2", "3"), ("2", "3")]


def test_cases_are_chosen_by_words(case: Case) -> None:
    assert selected([case, replace(case, rank=1)], ["r=1 "]) == [replace(case, rank=1)]
    with pytest.raises(ValueError, match="--cases: found none with nothing or no, expected part of fused"):
        selected([case], ["nothing", "no"])


def test_host_times_are_those_of_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcurlora_ext.bench.host.CALLS", 2)
    threads = torch.get_num_threads()
    rows = write_host(CPU, tmp_path, rounds=2)
    assert torch.get_num_threads() == threads
    names = {row["variant"] for row in rows}
    assert {"frozen", "lora", "tcur eager", "tcur eager, operator", "tcur dense layer"} <= names
    assert all(0 < float(row["least_us"]) <= float(row["median_us"]) for row in rows)
    assert {row["variant"] for row in host_times(CPU, 2)} == names
