"""Commands that ``python -m`` starts: their options, exit codes and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from tcurlora_ext.bench import experts, hippocampus, sanitize, scaling
from tcurlora_ext.bench.entry import run_command
from tcurlora_ext.bench.profile import command
from tcurlora_ext.bench.reading import plot, tables

MAINS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "plot": (plot.main, ("RESULTS", "--output FOLDER", "docs/figures")),
    "tables": (tables.main, ("PAGE", "--check")),
    "scaling": (scaling.main, ("--output", "bench/results/plan/llama.csv")),
    "profile": (command.main, ("--variant", "--rank", "--tokens", "--dtype", "--mode", "--device", "--output")),
    "sanitize": (sanitize.main, ("--variant", "--device")),
    "experts": (
        experts.main,
        ("--experts", "--hidden", "--intermediate", "--tokens", "--rank", "--repeats", "--implementation"),
    ),
    "hippocampus": (
        hippocampus.main,
        ("SYNTHSEG_MAPS", "HIPPOCAMPUS", "WORK", "RESULTS", "--methods", "--seeds", "--steps", "--pretrain-steps",
         "--train-list", "--val-list", "--run", "--lr"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAINS)
def test_help_lists_the_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, options = MAINS[name]
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("Usage: python")
    assert all(option in shown for option in options), shown
    assert "--only-run" not in shown


@pytest.mark.parametrize("name", MAINS)
def test_an_unknown_option_is_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, _ = MAINS[name]
    assert main(["--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("found 1"), FileNotFoundError("found 1"), ModuleNotFoundError("found 1")])
def test_wrong_input_is_one_line_and_exit_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert run_command(fail, [], "test") == 2
    assert capsys.readouterr().err == "error: found 1\n"


def test_a_bug_keeps_its_traceback_and_a_command_its_exit_code() -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    def out_of_date() -> None:
        raise typer.Exit(1)

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(bug, [], "test")
    assert run_command(out_of_date, [], "test") == 1
    assert run_command(lambda: None, [], "test") == 0
