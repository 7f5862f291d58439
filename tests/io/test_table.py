"""Long names in narrow columns, and sizes of files."""

from __future__ import annotations

import pytest

from tcurlora_ext.io.table import file_size, folded, shortened


def test_small_files_are_in_kb() -> None:
    sizes = (0, 40, 999_900, 1_000_000, 1_234_567_890)
    assert [file_size(size) for size in sizes] == ["0.0 KB", "0.0 KB", "999.9 KB", "1.0 MB", "1,234.6 MB"]


def test_a_text_is_cut_in_its_middle() -> None:
    name = "model_layers_0_mlp_experts_gate_up_proj_96x32"
    assert shortened(name, 27) == "model_la…gate_up_proj_96x32"
    assert shortened(name, 100) == name
    assert [len(shortened(name, width)) for width in (1, 2, 3, 14)] == [1, 2, 3, 14]


@pytest.mark.parametrize(
    ("name", "width", "parts"),
    [
        ("16x16", 8, ["16x16"]),
        ("experts_gate_up_proj", 14, ["experts_gate_", "up_proj"]),
        ("tcur:rank=4:seed=0", 8, ["tcur", ":rank=4", ":seed=0"]),
        ("proj_12x34", 10, ["proj_12x34"]),
        ("abcdefghij_k", 5, ["abcde", "fghij", "_k"]),
        ("a_very_long_name_of_a_stack_4x4", 6, ["a_ver…", "_a_sta", "ck_4x4"]),
    ],
)
def test_a_name_goes_on_in_the_next_lines(name: str, width: int, parts: list[str]) -> None:
    assert folded(name, width, 3) == parts
    assert all(len(part) <= width for part in parts)
