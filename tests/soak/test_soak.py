"""Short forms of the trials in this folder; docs/reliability.md has the figures of the long ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tcurlora_ext.adapter.files import format as files
from tcurlora_ext.io import described

from . import fuzz_files, kill_saving, long_training, random_layers


def test_damaged_files_are_refused_or_give_the_same_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_files.main(["200", "0"]) == 0, capsys.readouterr().out
    counts = dict(re.findall(r"(?:: |, )(\d+) (refused|same output)", capsys.readouterr().out))
    assert len(counts) == 2  # both kinds came, or the mutations would be too harsh or too mild


def test_a_library_that_takes_every_digest_fails_the_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (files, described):
        monkeypatch.setattr(module, "digest", lambda header, tensors: "any")
    assert fuzz_files.main(["100", "0"]) == 1
    assert "other output" in capsys.readouterr().out.splitlines()[0]


def test_kills_while_saving_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_saving.main(["3", "0", "0"]) == 0, capsys.readouterr().out


def test_random_layers_are_those_of_the_definition(capsys: pytest.CaptureFixture[str]) -> None:
    assert random_layers.main(["40", "0"]) == 0, capsys.readouterr().out


def test_a_backend_with_a_wrong_gradient_fails_the_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[[Any, Tensor], dict[str, Tensor]] = random_layers.results_of

    def wrong(case: Any, g: Tensor) -> dict[str, Tensor]:
        found = right(case, g)
        return found | {"core": found["core"] * (1 + 1e-9)} if case.backend == "native" else found

    monkeypatch.setattr(random_layers, "BACKENDS", ["native"])
    monkeypatch.setattr(random_layers, "results_of", wrong)
    random_layers.main(["10", "0"])
    assert "native, core: error 1.0e-09" in capsys.readouterr().out


def test_training_keeps_its_memory() -> None:
    assert long_training.main(["200"]) == 0


def test_memory_that_stays_fails_the_trial() -> None:
    # 36 MiB a step: above glibc's largest threshold (32 MiB), so each comes from the system. Smaller tensors may fit
    # into memory that the process has kept since an earlier test, and its resident set then does not grow.
    kept: list[Tensor] = []
    losses, sizes = long_training.train(20, keep=lambda y: kept.append(torch.ones(9 * 2**20)))
    assert long_training.judge(losses, dict.fromkeys(sizes, 0)) == 0
    assert long_training.judge(losses, sizes) == 1


def test_a_loss_that_is_not_finite_fails_the_trial() -> None:
    sizes = dict.fromkeys(range(1, 11), 0)
    assert long_training.judge([1.0] * 5 + [0.5] * 5, sizes) == 0
    assert long_training.judge([1.0] * 5 + [math.nan] + [0.5] * 4, sizes) == 1
