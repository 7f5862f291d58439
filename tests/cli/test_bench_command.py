"""``tcurlora bench``: its sets, its choices, what it writes and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tcurlora_ext.bench.cases import SETS, Layer, of_layer
from tcurlora_ext.bench.devices import Ceilings
from tcurlora_ext.bench.variants import variants
from tcurlora_ext.cli.app import app, main
from tcurlora_ext.io.records import read_csv


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick set of two cases that take no time."""
    layer = Layer("small", 24, 16, 3, 12)
    cases = [of_layer(layer, 32, rank=rank, compiled=False) for rank in (1, 2)]
    monkeypatch.setitem(SETS, "quick", lambda: cases)
    monkeypatch.setattr("tcurlora_ext.bench.host.CALLS", 2)


def bench(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("small")
def test_it_measures_shows_writes_and_compares(tmp_path: Path) -> None:
    output = bench("--rounds", "2", "--output", str(tmp_path))
    assert "small, r=1, T=32, training, float32" in output
    assert "the host's time for a forward call" in output
    (folder,) = tmp_path.iterdir()
    assert output.strip().endswith(f"written to {folder}")
    rows = read_csv(folder / "quick.csv")
    assert {row["rank"] for row in rows} == {"1", "2"}
    assert {"frozen", "lora", "tcur eager", "curlora dense"} <= {row["variant"] for row in rows}
    assert read_csv(folder / "host.csv")
    path = str(folder / "quick.csv")
    same = bench("--compare", path, path)
    assert f"{len(rows)} rows in both: 0 faster, 0 slower, 0 disturbed, {len(rows)} noise; 0 with other memory" in same


@pytest.mark.usefixtures("small")
def test_some_cases_and_variants_alone(tmp_path: Path) -> None:
    bench("--cases", "r=2", "--variants", "tcur eager", "--rounds", "2", "--output", str(tmp_path))
    (path,) = tmp_path.rglob("*.csv")  # host times belong to the whole set
    rows = read_csv(path)
    assert [(row["rank"], row["variant"]) for row in rows] == [("2", "frozen"), ("2", "lora"), ("2", "tcur eager")]


@pytest.mark.usefixtures("small")
def test_a_variant_that_fails_is_named_last_and_the_exit_code_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(*_: object) -> None:
        raise RuntimeError("a kernel does not compile")

    broken = [replace(v, adapt=compile) if v.name == "tcur eager" else v for v in variants(torch.device("cpu"))]
    monkeypatch.setattr("tcurlora_ext.bench.run.variants", lambda device: broken)
    monkeypatch.setattr("tcurlora_ext.bench.run.ceilings", lambda dtype, device: Ceilings(1e11, 1e10))
    arguments = ("--cases", "r=2", "--variants", "eager,transient", "--rounds", "2", "--output", str(tmp_path))
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 1, done.output
    assert "Traceback" in done.output
    assert done.output.splitlines()[-2:] == [
        "failed:", "small r=2 T=32 training float32, tcur eager: RuntimeError: a kernel does not compile"
    ]  # fmt: skip
    (path,) = tmp_path.rglob("*.csv")
    found = {row["variant"]: bool(row["median_ms"]) for row in read_csv(path)}
    assert found == {"frozen": True, "lora": True, "tcur eager": False, "tcur transient": True}


@pytest.mark.parametrize("flag", ["", "--full", "--growth", "--gpu"])
def test_listing_measures_nothing(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcurlora_ext.bench.results.run", None)
    name = flag.removeprefix("--") or "quick"
    output = bench("--list", *filter(None, [flag]))
    assert f"set {name}, {len(SETS[name]())} cases" in output
    assert all(case.id in output for case in SETS[name]())
    assert "variants on cpu: frozen, lora, " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "no such"], "--cases: found none with no such, expected part of unetr qkv, "),
        (["--variants", "dora"], "--variants: found none with dora, expected part of frozen, lora, "),
        (["--rounds", "1"], "--rounds is 1, expected at least 2"),
        (["--device", "tpu9"], "--device is 'tpu9', expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device is 'cuda:99', but torch "),
        (["--full", "--gpu"], "--full and --gpu are sets of cases, expected one of them"),
        (["--compare", "no.csv", "no.csv"], "no.csv: no such file; expected results of a benchmark there"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert len(captured.err.splitlines()) == 1
