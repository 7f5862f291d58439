"""The architectures of other packages: what is adapted by default, and that it trains, saves, loads and merges."""

from __future__ import annotations

from pathlib import Path

import pytest

import tcurlora_ext as tcur

from .architecture import Architecture
from .checks import ARCHITECTURES, CONFIG, check, find


@pytest.fixture(params=ARCHITECTURES, ids=lambda one: f"{one.package}-{one.name}")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    one: Architecture = request.param
    if not one.installed:
        pytest.skip(f"the package {one.package} is not installed")
    return one


@pytest.mark.filterwarnings("error:.*never called:UserWarning")
def test_it_trains_saves_loads_and_merges(architecture: Architecture, tmp_path: Path) -> None:
    found = find(architecture)
    if not found.refused:
        check(architecture, tmp_path)
        return
    assert not found.covers.adapted
    with pytest.raises(ValueError, match="the default adapts none of the"):
        tcur.inject(architecture.network(), CONFIG)
