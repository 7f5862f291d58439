"""Which backends work on this machine, which one "auto" takes and why, and the messages for those that do not work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import tcurlora_ext as tcur
from tcurlora_ext.operator.backends import choice, missing, native
from tcurlora_ext.operator.backends.choice import UNLIMITED, Rule, Sizes

CPU = torch.device("cpu")
SOME = Sizes(tokens=10, width=20, weight=30)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Clear the caches about devices and the extension before and after every test."""

    def forget() -> None:
        choice.choices.cache_clear()
        native._load.cache_clear()
        built = native.extension()
        if built is not None:
            built.set_choices(choice.as_plain_values)

    forget()
    yield
    forget()


def test_every_backend_has_a_status_with_a_reason() -> None:
    found = tcur.backends()
    assert set(found) == {"eager", "native", "triton"}
    assert bool(found["eager"])
    for name, status in found.items():
        assert status.name == name
        assert status.reason
        assert bool(status) is status.works


def test_auto_is_one_that_works_and_its_status_says_so() -> None:
    rule = choice.choose("auto", CPU, torch.float32, SOME)
    status = tcur.backends()[rule.backend]
    assert status
    assert f"'auto' takes on cpu {rule}" in status.reason


def test_a_backend_asked_for_is_taken() -> None:
    assert choice.choose("eager", CPU, torch.float32, SOME).backend == "eager"


@pytest.mark.usefixtures("_fresh")
def test_a_backend_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "missing", lambda name, _: "it was left out" if name == "native" else "")
    with pytest.raises(RuntimeError, match="backend 'native' does not work on cpu: it was left out; use 'auto'"):
        choice.choose("native", CPU, torch.float32, SOME)
    assert choice.choose("auto", CPU, torch.float32, SOME).backend != "native"  # passed over


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend 'numpy' is unknown.*native"):
        choice.choose("numpy", CPU, torch.float32, SOME)


@pytest.mark.usefixtures("_fresh")
def test_an_extension_that_does_not_load_is_no_error_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    with monkeypatch.context() as patch:
        native._load.cache_clear()
        patch.setattr(native.importlib, "import_module", fail)
        assert native.extension() is None
        assert "undefined symbol" in tcur.backends()["native"].reason


RULES = (
    Rule("native", "one dtype", dtypes=(torch.float16,)),
    Rule("eager", "small", dtypes=(torch.float32, torch.bfloat16), tokens=(0, 8)),
    Rule("native", "wide", width=(64, 128), weight=(1000, UNLIMITED)),
    Rule("eager", "the rest"),
)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("dtype", "sizes", "expected"),
    [
        (torch.float16, Sizes(1, 1, 1), "one dtype"),
        (torch.float32, Sizes(8, 64, 1000), "small"),
        (torch.float32, Sizes(9, 64, 1000), "wide"),
        (torch.float64, Sizes(8, 128, 1000), "wide"),
        (torch.float64, Sizes(8, 129, 1000), "the rest"),
        (torch.float64, Sizes(8, 128, 999), "the rest"),
    ],
)
def test_the_first_rule_that_matches_a_call_decides(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: Sizes, expected: str
) -> None:
    monkeypatch.setitem(choice.TABLE, "cpu", RULES)
    monkeypatch.setattr(choice, "missing", lambda *_: "")
    assert choice.choose("auto", CPU, dtype, sizes).reason == expected


@pytest.mark.usefixtures("_fresh")
def test_the_extension_reads_the_same_table_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    built = native.extension()
    if built is None:
        pytest.skip(missing("native", "cpu"))
    monkeypatch.setitem(choice.TABLE, "cpu", RULES)
    choice.choices.cache_clear()
    built.set_choices(choice.as_plain_values)
    seen = set()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for tokens in (0, 8, 9):
            for width in (63, 64, 128, 129):
                for weight in (999, 1000, 2**40):
                    expected = choice.choose("auto", CPU, dtype, Sizes(tokens, width, weight)).backend
                    name = str(dtype).removeprefix("torch.")
                    assert built.choose("auto", "cpu", name, [tokens, width, weight]) == expected
                    seen.add(expected)
    assert seen == {"eager", "native"}


def test_rules_read_as_text() -> None:
    assert str(RULES[1]) == "eager for float32, bfloat16; tokens 0 to 8 (small)"
    assert str(RULES[2]) == "native for width 64 to 128; weight from 1000 (wide)"
    assert str(RULES[3]) == "eager for everything (the rest)"


CALL = """
import torch, tcurlora_ext as tcur
layer = tcur.TCURLinear(8, 8, rank=2)
calls = []
from tcurlora_ext.operator.backends import eager
layer(torch.randn(3, 8))
print([name for name, s in tcur.backends().items() if "TCURLORA_BACKEND is set" in s.reason])
"""


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("eager", 0, "['eager']"),
        ("auto", 0, "[]"),
        ("triton", 1, "backend 'triton' does not work on cpu"),
        ("numpy", 1, "TCURLORA_BACKEND is 'numpy', expected 'auto' or one of eager, native, triton"),
    ],
)
def test_the_environment_overrides_the_table(value: str, code: int, text: str) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"} | {choice.VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
