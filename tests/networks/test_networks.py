"""The architectures of other packages: what is adapted by default, and that it trains, saves, loads and merges."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.targets import DEFAULT_TARGETS, find_targets, group

from .architecture import Architecture
from .checks import ARCHITECTURES, CONFIG, check, find
from .table import PAGE, read, row


@pytest.fixture(params=ARCHITECTURES, ids=lambda one: f"{one.package}-{one.name}")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    one: Architecture = request.param
    if one.missing:
        pytest.skip(one.missing)
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


def test_its_row_in_the_page_is_what_is_found(architecture: Architecture) -> None:
    rows, versions = read(PAGE.read_text())
    if versions.get(architecture.package) != version(architecture.package):
        pytest.skip(f"the table is that of {architecture.package} {versions.get(architecture.package)}")
    assert rows.get(architecture.name) == row(architecture), "run python -m tests.networks.table"


def test_the_page_has_a_row_for_each_architecture_of_the_packages_it_names() -> None:
    rows, versions = read(PAGE.read_text())
    assert list(rows) == [one.name for one in ARCHITECTURES if one.package in versions]
    assert len(rows) >= 45


BY_NAME = tcur.TCURConfig(rank=2, target_modules=DEFAULT_TARGETS)
AS_BEFORE = ("BERT", "GPT-2", "Llama", "ViT", "CLIP", "UNETR", "SwinUNETR", "ViT of MONAI")


@pytest.mark.parametrize("name", AS_BEFORE)
def test_networks_whose_names_are_known_have_the_same_stacks_as_by_their_names(name: str) -> None:
    """Adapters in files, and the figures of the docs, are those of the layers that the names alone say."""
    one = next(one for one in ARCHITECTURES if one.name == name)
    if one.missing:
        pytest.skip(one.missing)
    model = one.network()
    stacks = [group(find_targets(model, config), config) for config in (CONFIG, BY_NAME)]
    first, second = ({stack: [(t.name, t.slices) for t in members] for stack, members in s.items()} for s in stacks)
    assert first == second
