"""The bench of a layer of experts: its table of a small layer, and how it takes times."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tcurlora_ext.bench import experts

SMALL = ["--experts", "2", "--hidden", "16", "--intermediate", "32", "--tokens", "8", "--rank", "2", "--repeats", "1"]


@pytest.mark.parametrize("implementation", experts.IMPLEMENTATIONS)
def test_the_table_has_a_row_for_each_way(implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.main([*SMALL, "--implementation", implementation]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {" ".join(cells[:-3]): cells[-3:] for cells in lines if cells[-1].replace(".", "").isdigit()}
    assert {name: trained for name, (trained, _, _) in found.items()} == {
        "frozen": "0",
        "slices coupled by the DFT": "16",  # two stacks of two experts at rank 2
        "a core for each expert": "16",
        "LoRA of PEFT": "512",  # 2 experts * rank 2 * (16 + 64 of gate and up, 32 + 16 of down)
    }
    assert found["frozen"][2] == "1.00"


def test_an_unknown_implementation_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.main([*SMALL, "--implementation", "eagre"]) == 2
    message = "error: implementation: found 'eagre', expected one of eager, grouped_mm, batched_mm\n"
    assert capsys.readouterr().err == message


def test_calls_take_turns_after_two_that_warm_up() -> None:
    order: list[str] = []
    found = experts.measure({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == list("ab" * 5)
    assert found.keys() == {"a", "b"}
