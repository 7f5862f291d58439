"""The kernels' package without Triton: what it imports, its tables, and its phases."""

from __future__ import annotations

import cmath
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tcurlora_ext.kernels import configs
from tcurlora_ext.kernels.middle import WIDEST_GROUP, Middle, phase_table

IMPORTS = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import tcurlora_ext, tcurlora_ext.kernels, tcurlora_ext.kernels.configs, tcurlora_ext.kernels.middle
"""


def test_the_package_imports_without_triton() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=Path(__file__).parents[2])


def test_the_kernels_are_compiled_by_the_oldest_triton_that_is_allowed() -> None:
    """make oldest-triton takes the version that pyproject.toml names."""
    root = Path(__file__).parents[2]
    compiled = re.search(r"^TRITON_VERSION := (\d+\.\d+)\.\d+$", (root / "Makefile").read_text(), re.MULTILINE)
    allowed = re.search(r"triton>=(\d+\.\d+);", (root / "pyproject.toml").read_text())
    assert compiled is not None
    assert allowed is not None
    assert compiled[1] == allowed[1]


@pytest.mark.parametrize("name", [*configs.TABLES, "another GPU", "unaligned rows"])
def test_every_kernel_has_a_configuration_for_any_number_of_tokens(name: str) -> None:
    table = configs.table_for(name, aligned=name != "unaligned rows")
    kernels = {kernel for kernel, _ in table.rules}
    assert kernels == {k for k in configs.KERNELS if table.fused_q or not k.startswith("fused")}
    for (kernel, itemsize), rules in table.rules.items():
        limits = [limit for limit, _ in rules]
        assert limits[-1] is None
        assert all(isinstance(limit, int) for limit in limits[:-1])
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        for tokens in (1, 1024, 1025, 2**20):
            assert table.config(kernel, dtype, tokens) in table.configs(kernel, itemsize)


def test_every_entry_names_the_file_of_its_measurement_or_says_that_there_is_none() -> None:
    results = Path(__file__).parents[2] / "bench" / "results"
    for table in (*configs.TABLES.values(), configs.FALLBACK, configs.UNALIGNED):
        for _, config in (rule for rules in table.rules.values() for rule in rules):
            measured = config.basis.endswith(".csv") and (results / config.basis).is_file()
            assert measured or config.basis == configs.BY_COUNT, config


@pytest.mark.parametrize("S", [1, 2, 3, 6, 7, 12])
def test_phases_are_those_of_the_definition(S: int) -> None:
    """w exp(2 pi i k l / S) for frequency k in slice l; for the DCT the entries of its matrix."""
    cpu = torch.device("cpu")
    table = phase_table(S, "dft", cpu)
    assert table.dtype == torch.float32
    assert table.shape == (S, S // 2 + 1, 2)
    for layer in range(S):
        for k in range(S // 2 + 1):
            alone = k == 0 or 2 * k == S
            right = cmath.exp(2j * math.pi * k * layer / S) * math.sqrt((1 if alone else 2) / S)
            assert complex(*table[layer, k].tolist()) == pytest.approx(right, abs=1e-6)
            dct = math.cos(math.pi / S * k * (layer + 0.5)) * math.sqrt((1 if k == 0 else 2) / S)
            assert phase_table(S, "dct", cpu)[layer, k].tolist() == pytest.approx([dct, 0.0], abs=1e-6)


@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize(("S", "c", "r"), [(1, 1, 1), (48, 8, 8), (7, 3, 5), (6, 20, 32), (500, 1, 2)])
def test_a_tile_holds_whole_groups_and_what_lies_before_them(S: int, c: int, r: int, transform: str) -> None:
    middle = Middle.of(torch.zeros(S, c, r), 0, 1, 1.0, transform)
    assert middle.fits_a_tile is (middle.halves * max(c, r) + (7 if max(c, r) % 8 else 0) <= WIDEST_GROUP)
    for block_q in (16, 64, 128):
        tiling = middle.tiling(block_q)
        assert 1 <= tiling.groups <= middle.groups
        for width, block in ((c, tiling.block_c), (r, tiling.block_r)):
            assert block & (block - 1) == 0
            for tile in range(-(-middle.groups // tiling.groups)):
                first = tile * tiling.groups * middle.halves * width - (middle.halves - 1) * width
                start = first // 8 * 8
                assert first + tiling.groups * middle.halves * width <= start + block
        if middle.fits_a_tile and block_q >= WIDEST_GROUP:
            assert max(tiling.block_c, tiling.block_r) <= block_q
