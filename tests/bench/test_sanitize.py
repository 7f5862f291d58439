"""The short test of the kernels, which compute-sanitizer also runs: on the CPU, where it needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tcurlora_ext.bench import sanitize
from tcurlora_ext.bench.variants import variants
from tcurlora_ext.operator.backends import missing

CPU = torch.device("cpu")


@pytest.mark.skipif(bool(missing("native", "cpu")), reason="the extension is not built")
def test_the_layers_are_right_by_the_variant_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu", "--variant", "tcur native"]) == 0
    assert capsys.readouterr().out == f"{len(sanitize.CASES)} layers by tcur native: right\n"


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = next(variant for variant in variants(CPU) if variant.name == "tcur eager")
    forward = torch.nn.functional.linear

    def wrong(*arguments: Any) -> torch.Tensor:
        return forward(*arguments) * 1.5

    monkeypatch.setattr("torch.nn.functional.linear", wrong)
    with pytest.raises(RuntimeError, match="tcur eager: output 0 is off by"):
        sanitize.step(sanitize.CASES[0], [eager], CPU)


def test_a_variant_that_does_not_work_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu", "--variant", "tcur eager"]) == 2
    assert capsys.readouterr().err.startswith("error: --variant is 'tcur eager', expected one that works on cpu: ")
