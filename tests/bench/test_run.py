"""The runner and its files: rows say what was measured, a set is written as it goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tcurlora_ext.bench import results
from tcurlora_ext.bench.cases import Case
from tcurlora_ext.bench.devices import Ceilings, ceilings, device_name, folder_name
from tcurlora_ext.bench.host import host_times
from tcurlora_ext.bench.networks import Network
from tcurlora_ext.bench.results import selected, write_host, write_set
from tcurlora_ext.bench.rows import read_failures, read_results
from tcurlora_ext.bench.run import MEASURED, Row, case_columns, run
from tcurlora_ext.bench.variants import Problem, Variant, variants
from tcurlora_ext.io.records import read_csv, write_csv

CPU = torch.device("cpu")


def rows_of(case: Case, names: tuple[str, ...]) -> list[Row]:
    (rows,) = run([case], CPU, 3, lambda variant, _: variant.name in names, print)
    return rows


def test_rows_say_what_was_measured(case: Case) -> None:
    rows = rows_of(case, ("tcur native", "peft lora r=32"))
    names = [row["variant"] for row in rows]
    assert names[:2] == ["frozen", "lora"]
    assert {tuple(row) for row in rows} == {(*case_columns(case), "variant", *MEASURED)}
    assert {row["failure"] for row in rows} == {""}
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


class Fails(torch.nn.Module):
    """The network it is given, until its forward pass raises an error at one of its calls."""

    def __init__(self, module: torch.nn.Module, calls: float, error: Exception) -> None:
        super().__init__()
        self.module, self.calls, self.error = module, calls, error

    def forward(self, *inputs: Tensor) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.module(*inputs)


def off_by_one(module: torch.nn.Module, network: Network, case: Case) -> torch.nn.Module:
    """Not what the frozen network computes: 1 is added to its bias."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            module.get_submodule(name.rpartition(".")[0]).bias = torch.nn.Parameter(parameter + 1, requires_grad=False)
    return module


def failing(calls: float, error: Exception) -> Any:
    """The frozen network, whose forward pass fails after so many calls."""
    return lambda module, network, case: Fails(module, calls, error)


def out_of_memory(module: torch.nn.Module, network: Network, case: Case) -> torch.nn.Module:
    raise torch.OutOfMemoryError("tried to allocate 1 GiB")


# Name -> how it adapts the network, and what its row says. The check calls it once, its timing on a CPU once a round.
BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (failing(0, RuntimeError("a kernel\n  failed " + "x" * 999)), "RuntimeError: a kernel failed xxx"),
    "wrong": (off_by_one, "RuntimeError: fused r=2 T=32 training float32, wrong: output 0 is off by "),
    "out of memory": (out_of_memory, "OutOfMemoryError: tried to allocate 1 GiB"),
    "raises later": (failing(3, RuntimeError("in the second round")), "RuntimeError: in the second round"),
}


def with_variants(monkeypatch: pytest.MonkeyPatch, *given: Variant) -> None:
    """The runner's variants are the frozen network, LoRA, the operator in PyTorch operations and these, in their place
    or after them. The ceilings are made up: measuring them takes long.
    """
    known = {v.name: v for v in variants(CPU) if v.name in ("frozen", "lora", "tcur eager")}
    found = list((known | {variant.name: variant for variant in given}).values())
    monkeypatch.setattr("tcurlora_ext.bench.run.variants", lambda device: found)
    monkeypatch.setattr("tcurlora_ext.bench.run.ceilings", lambda dtype, device: Ceilings(1e11, 1e10))


def test_a_variant_that_fails_is_a_row_that_says_why_and_the_others_are_measured(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variants(monkeypatch, *(Variant(name, "frozen", adapt) for name, (adapt, _) in BROKEN.items()))
    logged: list[str] = []
    (rows,) = run([case], CPU, 3, lambda *_: True, logged.append)
    found = {row["variant"]: row for row in rows}
    assert list(found) == ["frozen", "lora", "tcur eager", *BROKEN]
    for name in ("frozen", "lora", "tcur eager"):
        assert found[name]["failure"] == ""
        assert all(float(found[name][column]) > 0 for column in ("over_frozen", "median_ms", "gflop"))
    for name, (_, message) in BROKEN.items():
        row = found[name]
        assert row["failure"].startswith(message)
        assert len(row["failure"]) <= 200
        assert "\n" not in row["failure"]
        assert {row[column] for column in MEASURED[:-1]} == {""}
        assert list(row) == list(found["frozen"])
    assert [line.split("\n")[0] for line in logged] == [f"{case.id}, {name}: failed" for name in BROKEN]
    assert all("Traceback" in line for line in logged)


def test_without_lora_there_are_times_and_no_ratios_to_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with_variants(monkeypatch, Variant("lora", "lora", out_of_memory))
    (rows,) = run([case], CPU, 2, lambda *_: True, lambda line: None)
    eager = next(row for row in rows if row["variant"] == "tcur eager")
    assert (eager["over_lora"], eager["extra_over_lora"], eager["failure"]) == ("", "", "")
    assert float(eager["over_frozen"]) > 0


@pytest.mark.parametrize("calls", [0, 2])
def test_where_the_frozen_network_fails_so_does_the_case(
    calls: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the check and in the first round. The next case is measured."""
    added = Variant("frozen", "frozen", lambda m, _, c: m if c.rank == 1 else Fails(m, calls, ValueError("no")))
    with_variants(monkeypatch, added)
    logged: list[str] = []
    first, second = run([case, replace(case, rank=1)], CPU, 2, lambda *_: True, logged.append)
    assert [(row["variant"], row["failure"]) for row in first] == [("frozen", "ValueError: no")]
    assert [row["failure"] for row in second] == [""] * 3
    assert logged[0].startswith(f"{case.id}, frozen: failed\n")


@pytest.mark.parametrize("broken", ["frozen", "lora"])
def test_where_counting_fails_the_times_are_kept(broken: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(problem: Problem, passed: Any) -> int:
        if problem.variant.name == broken:
            raise RuntimeError("no profiler")
        return 1

    with_variants(monkeypatch)
    monkeypatch.setattr("tcurlora_ext.bench.run.fewest_bytes", count)
    (rows,) = run([case], CPU, 2, lambda *_: True, lambda line: None)
    found = {row["variant"]: row for row in rows}
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert found[broken]["failure"] == "RuntimeError: no profiler"
    assert found[broken]["peak_mib"] == ""
    assert found["tcur eager"]["failure"] == ("frozen failed" if broken == "frozen" else "")


def test_a_row_that_failed_is_written_and_replaced(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the first case of a file has failed as a whole, and where the file was written by an older version."""
    monkeypatch.setitem(results.SETS, "small", lambda: [replace(case, rank=1), case])
    with monkeypatch.context() as patched:
        broken = failing(0, ValueError("no"))
        with_variants(patched, Variant("frozen", "frozen", lambda m, n, c: broken(m, n, c) if c.rank == 1 else m))
        path = write_set("small", CPU, tmp_path, rounds=2, log=lambda line: None)
    assert [row["variant"] for row in read_results(path)] == ["frozen", "lora", "tcur eager"]
    (failure,) = read_failures(path)
    assert failure == "fused r=1 T=32 training float32, frozen: ValueError: no"
    write_csv(path, [{name: cell for name, cell in row.items() if name != "failure"} for row in read_csv(path)])
    assert read_failures(path) == []
    with_variants(monkeypatch)
    write_set("small", CPU, tmp_path, [replace(case, rank=1)], rounds=2, keep=lambda *_: False)
    assert [(row["rank"], row["failure"]) for row in read_csv(path)] == [("1", "")] * 2 + [("2", "")] * 3


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
