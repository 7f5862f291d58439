"""What works here, and what is said where something does not."""

from __future__ import annotations

import pytest

import tcurlora_ext as tcur
from tcurlora_ext.operator import backends


def test_every_backend_has_a_status_with_a_reason() -> None:
    found = tcur.backends()
    assert set(found) == {"eager", "native", "triton"}
    assert bool(found["eager"])
    for name, status in found.items():
        assert status.name == name
        assert status.reason
        assert bool(status) is status.works


def test_auto_takes_one_that_works() -> None:
    assert tcur.backends()[backends.resolve("auto")]
    assert backends.resolve("eager") == "eager"


def test_a_backend_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.BackendStatus("native", False, "it was left out")
    monkeypatch.setattr(backends, "backends", lambda: {"native": broken})
    with pytest.raises(RuntimeError, match="backend 'native' does not work here: it was left out"):
        backends.resolve("native")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend 'numpy' is unknown.*native"):
        backends.resolve("numpy")


def test_an_extension_that_does_not_load_is_no_error_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    backends._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(backends.importlib, "import_module", fail)
        assert backends.extension() is None
        assert "undefined symbol" in backends.backends()["native"].reason
    backends._load.cache_clear()
