"""The command as a whole: its two forms, its help, its rule for errors, and `doctor`."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import tcurlora_ext as tcur
from tcurlora_ext.cli import app as module
from tcurlora_ext.cli.app import app, main
from tcurlora_ext.operator.backends import native

COMMANDS = (
    "finetune", "pretrain", "predict", "evaluate", "plan", "inspect", "features", "merge", "to-lora", "bench", "doctor",
)  # fmt: skip


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tcurlora_ext", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: tcurlora" in done.stdout
    assert all(command in done.stdout for command in COMMANDS)


def test_wrong_input_to_the_module_is_one_line_and_code_2() -> None:
    command = [sys.executable, "-m", "tcurlora_ext", "plan", "no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model: found 'no-such-model', expected unetr, swinunetr, vit, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f"Usage: tcurlora {command}" in done.output.replace("root ", "tcurlora ")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tcurlora_ext.operator.backends.backends", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


@pytest.mark.parametrize(
    ("error", "handled"),
    [
        (ValueError("found 1, expected 2"), True),
        (FileNotFoundError("x: no such file"), True),
        (ModuleNotFoundError("no monai: pip install 'tcurlora_ext[segmentation]'", name="monai"), True),
        (ModuleNotFoundError("No module named 'typo'", name="typo"), False),
    ],
)
def test_which_errors_are_the_users(
    error: Exception, handled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> dict[str, object]:
        raise error

    monkeypatch.setattr("tcurlora_ext.operator.backends.backends", failing)
    if not handled:
        with pytest.raises(type(error)):
            main(["doctor"])
        return
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_warning_about_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    others: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, "_show_any", lambda *arguments: others.append(arguments))
    inside = str(Path(module.__file__).parents[1] / "segmentation" / "base.py")
    module.show_warning("a.nii.gz: left out", UserWarning, inside, 3)
    assert capsys.readouterr().err == "warning: a.nii.gz: left out\n"
    for category, file in ((UserWarning, "elsewhere.py"), (DeprecationWarning, inside)):
        module.show_warning("another", category, file, 3)
        assert others.pop() == ("another", category, file, 3, None, None)
    assert capsys.readouterr().err == ""


def test_what_torchao_logs_at_its_import_is_not_shown_and_all_else_is(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    logging.getLogger("torchao").warning("Failed to load %s: no such library", "torchao/_C.so")
    logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and is now natively supported", int)
    assert caplog.messages == []
    for name in ("torchao", "tcurlora_ext"):
        logging.getLogger(name).warning("another")
    logging.getLogger("tcurlora_ext").warning("Failed to load the model")
    assert caplog.messages == ["another", "another", "Failed to load the model"]


def test_doctor_names_versions_devices_backends_and_reasons() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for word in ("python", "torch", "triton", "CUDA of torch", "cpu", "eager", "native", "triton", "segmentation"):
        assert word in done.output
    assert "works: PyTorch operations" in done.output


@pytest.mark.parametrize(
    ("cuda", "kernels", "said"),
    [
        ("13.0", ("cpu",), "the C++ extension was built with kernels for cpu"),
        ("13.0", None, "the C++ extension was not built"),
        ("13.0", ("cpu", "cuda"), ""),
        (None, ("cpu",), ""),
    ],
)
def test_doctor_says_first_where_a_cuda_torch_has_no_cuda_kernels(
    cuda: str | None, kernels: tuple[str, ...] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = None if kernels is None else SimpleNamespace(build=lambda: {"torch": "2", "kernels": kernels})
    monkeypatch.setattr(native, "_load", lambda: (built, "" if built else "the C++ extension was not built"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    first = CliRunner().invoke(app, ["doctor"]).output.splitlines()[0]
    if said:
        assert first.startswith(f"without CUDA kernels: torch {torch.__version__} is a CUDA build, but {said}; ")
    else:
        assert first.strip() == "versions"


def test_doctor_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = sys.modules["tcurlora_ext.cli.doctor"]
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "monai" else object())
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "without monai: pip install 'tcurlora_ext[segmentation]'" in done.output


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"tcurlora {tcur.__version__}\n"
    assert module.EXTRA_HINT
