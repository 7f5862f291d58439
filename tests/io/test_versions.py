"""Versions: of this package that of the code, of others that of their metadata."""

from __future__ import annotations

import pytest

import tcurlora_ext as tcur
from tcurlora_ext.io import versions


def test_the_own_version_is_that_of_the_code_whatever_its_metadata_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "0.0.1")
    assert versions.version_of("tcurlora_ext") == tcur.__version__
    assert versions.version_of("torch") == "0.0.1"


def test_a_package_that_is_missing_has_none() -> None:
    assert versions.version_of("no-such-package") == ""
