"""A backend that is added to the registry is measured, tabulated and drawn without an edit in bench/."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tcurlora_ext.bench.cases import SETS, convolutions
from tcurlora_ext.bench.names import kernel_variants, operator_variants
from tcurlora_ext.bench.reading.plot import draw
from tcurlora_ext.bench.reading.styles import MARKERS, style, style_order
from tcurlora_ext.bench.reading.tables import TABLES
from tcurlora_ext.bench.rows import read_results, tcur_backend
from tcurlora_ext.io.records import write_csv
from tcurlora_ext.operator.backends import BACKENDS

from .made_up import row

NEW = "tcur new"


@pytest.fixture(autouse=True)
def new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fourth backend, which computes as the first one does."""
    monkeypatch.setitem(BACKENDS, "new", replace(BACKENDS["eager"], name="new"))


def test_it_is_a_variant_of_every_case_that_compares_backends() -> None:
    assert list(operator_variants()) == [f"tcur {name}" for name in BACKENDS]
    assert set(operator_variants()) - set(kernel_variants()) == {"tcur eager"}
    for case in SETS["growth"]():
        assert NEW in case.variants
        assert "tcur eager" not in case.variants
    compared = [case for case in SETS["quick"]() if case.variants and case not in convolutions()]
    assert compared
    assert all(NEW in case.variants for case in compared)


def test_it_is_tabulated(tmp_path: Path) -> None:
    names = ("frozen", "lora", *operator_variants())
    write_csv(tmp_path / "quick.csv", [row(name, 10.0 + i, extra_over_lora=0.5) for i, name in enumerate(names)])
    make, _ = TABLES["backends"]
    assert NEW in make(read_results(tmp_path / "quick.csv"))[0]
    assert tcur_backend([row("tcur eager", 3.0), row(NEW, 2.0)]) == NEW


def test_it_is_drawn_with_a_marker_of_its_own(tmp_path: Path) -> None:
    assert len({style(name) for name in operator_variants()}) == len(BACKENDS)
    assert style_order("tcur eager") < style_order(NEW) < style_order("tcur compiled")
    rows = [row(name, 10.0 + index) for index, name in enumerate(("frozen", "lora", *operator_variants()))]
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    write_csv(tmp_path / "results" / "cpu" / "quick.csv", rows)
    assert len(draw(tmp_path / "results", tmp_path / "pictures")) == 2


def test_markers_repeat_where_there_are_more_backends_than_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(len(MARKERS)):
        monkeypatch.setitem(BACKENDS, f"another {index}", replace(BACKENDS["eager"], name=f"another {index}"))
    for name in operator_variants():
        assert style(name)[1] in MARKERS


# The operators are registered when the package is imported, with the backends that there are by then.
MEASURED = """
import sys, types
from dataclasses import replace
from importlib.util import find_spec

stub = types.ModuleType("tcurlora_ext")
stub.__path__ = list(find_spec("tcurlora_ext").submodule_search_locations)
sys.modules["tcurlora_ext"] = stub
from tcurlora_ext.operator.backends.registry import BACKENDS
BACKENDS["new"] = replace(BACKENDS["eager"], name="new")
del sys.modules["tcurlora_ext"]

import torch
from tcurlora_ext.bench import host, run, sanitize
from tcurlora_ext.bench.cases import TINY, of_layer
from tcurlora_ext.bench.names import kernel_variants
from tcurlora_ext.bench.variants import variants

cpu, case = torch.device("cpu"), of_layer(TINY, 4, rank=2, compiled=False)
host.CALLS = 1
(rows,) = run.run([case], cpu, 2, lambda variant, _: variant.backend == "new", print)
sanitize.step(case, [variant for variant in variants(cpu) if variant.name in kernel_variants()], cpu)
print([row["variant"] for row in rows], [row["variant"] for row in host.host_times(cpu, 1)], sep="\\n")
"""


def test_it_is_measured() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, host = (ast.literal_eval(line) for line in done.stdout.splitlines()[-2:])
    assert rows == ["frozen", "lora", NEW]
    assert {NEW, f"{NEW}, operator"} <= set(host)
