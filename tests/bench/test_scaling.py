"""Llama's shapes by count: parameters as published, the committed file up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tcurlora_ext.bench.scaling import SIZES, llama, main

pytest.importorskip("transformers")
COMMITTED = Path(__file__).parents[2] / "bench/results/plan/llama.csv"


@pytest.mark.parametrize(("size", "billions"), [("7B", 6.74), ("8B", 8.03), ("70B", 70.6), ("405B", 405.9)])
def test_parameters_are_as_many_as_the_name_says(size: str, billions: float) -> None:
    with torch.device("meta"):
        model = llama(size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


def test_the_committed_file_is_what_the_command_counts(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "new" / "llama.csv")])
    assert (tmp_path / "new" / "llama.csv").read_text() == COMMITTED.read_text()


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(ValueError, match=f"size: found '1B', expected one of {', '.join(SIZES)}"):
        llama("1B")
