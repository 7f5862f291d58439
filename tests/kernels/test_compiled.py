"""Every kernel with every configuration of the tables, compiled for GPUs without having one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
WORKERS = 2
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kernels_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


KEEPS_TO = "test_a_kernel_keeps_to_registers_and_shared_memory"
SPECS = {spec.name: spec for spec in _load("cases").specs()}


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Results by the name of each case that a test asks for, from processes in which Triton does not interpret."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [item.callspec.params["name"] for item in tests if item.originalname == KEEPS_TO]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    environment.setdefault(
        "TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton"))
    )  # the Makefile keeps it in build/
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "aot.py"), str(part), str(WORKERS), *names],
            env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(WORKERS)
    ]  # fmt: skip
    results = {}
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        results.update({line["name"]: line["compiled"] for line in map(json.loads, out.splitlines())})
    return results


def test_every_configuration_of_every_table_is_compiled() -> None:
    cases = sys.modules["kernels_cases"]
    asked = {(spec.kernel, spec.config) for spec in SPECS.values()}
    tables = cases.TABLES.values()
    assert asked == {(kernel, c) for t in tables for (kernel, _), rules in t.rules.items() for _, c in rules}
    assert len(SPECS) == len(cases.specs())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_kernel_keeps_to_registers_and_shared_memory(compiled: dict[str, Any], name: str) -> None:
    spec = SPECS[name]
    for kernel in compiled[name]:
        assert kernel["stack"] == 0, kernel
        assert kernel["local"] == [], kernel
        assert kernel["shared"] <= SHARED_MEMORY[spec.capability], kernel
        if spec.table in ("fallback", "unaligned"):
            assert kernel["shared"] <= 99 * 1024, kernel
        assert kernel["transposed"] == [], kernel
    # Stage 2 of the core's gradient adds; float32 in ieee precision and unaligned rows stay off the tensor cores' path.
    if spec.capability == 90 and spec.dtype != "float32" and spec.table != "unaligned":
        # Hopper's own matrix instructions take 64 rows: of tokens, and for the riding form's core gradient of c.
        matrix = compiled[name][0]["matrix"]
        assert matrix.get("HGMMA" if spec.config.block_m >= 64 else "HMMA", 0) > 0, compiled[name]
        assert "HMMA" not in matrix or spec.kernel == "ride_back" or spec.config.block_m < 64, compiled[name]


@pytest.mark.slow
def test_the_readings_see_what_they_should_refuse(compiled: dict[str, Any]) -> None:
    (transposed,), (spilling,) = compiled["transposed"], compiled["spilling"]
    assert transposed["transposed"] != []
    assert transposed["matrix"]["HGMMA"] > 0
    assert spilling["stack"] > 0
    assert {operation.split(".")[0] for operation in spilling["local"]} == {"LDL", "STL"}
