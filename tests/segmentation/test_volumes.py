"""Volumes in memory and on disk, and windows drawn by worker processes: the same values, and memory that stays flat."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tcurlora_ext.segmentation.dataset import Volume, load_volumes, read_dataset
from tcurlora_ext.segmentation.dataset import transform as preparing
from tcurlora_ext.segmentation.dataset.volumes import open_volumes
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Plan, Sampler
from tcurlora_ext.segmentation.training.sampling import windows

SPACING = (2.5, 2.5, 2.5)


def assert_equal(found: Volume, expected: Volume) -> None:
    assert (found.name, tuple(found.spacing)) == (expected.name, tuple(expected.spacing))
    for name in ("image", "label", "truth"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        assert torch.equal(a.affine, b.affine)
        assert a.affine.dtype == b.affine.dtype


def fail(*given: object) -> None:
    raise AssertionError("a volume was prepared again")


def test_both_kinds_have_what_load_volumes_reads(pristine_data: Path, tmp_path: Path) -> None:
    cases = read_dataset(pristine_data).train
    expected = load_volumes(cases, SPACING)
    kept, stored = open_volumes(cases, SPACING), open_volumes(cases, SPACING, tmp_path / "cache")
    assert (kept.on_disk, stored.on_disk) == (False, True)
    for volumes in (kept, stored, stored):  # prepared the first time, read the second
        assert len(volumes) == len(cases)
        for found, wanted in zip(volumes, expected, strict=True):
            assert_equal(found, wanted)
    assert stored[1:].names == stored.part([1, 2]).names == ("case_001", "case_002")
    assert_equal(stored[1:][0], expected[1])


def test_a_prepared_volume_is_used_until_its_file_or_the_preparation_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, cache = read_dataset(data).train, tmp_path / "cache"
    first = list(open_volumes(cases, SPACING, cache))
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "load_volumes", fail)
        for found, wanted in zip(open_volumes(cases, SPACING, cache), first, strict=True):
            assert_equal(found, wanted)
        with pytest.raises(AssertionError, match="prepared again"):
            open_volumes(cases, None, cache)[0]
    cases[0].image.write_bytes(cases[1].image.read_bytes())
    changed = open_volumes(cases, SPACING, cache)[0]
    assert not torch.equal(torch.as_tensor(changed.image), torch.as_tensor(first[0].image))


def test_an_incomplete_file_in_the_cache_is_prepared_again(pristine_data: Path, tmp_path: Path) -> None:
    cases, cache = read_dataset(pristine_data).train, tmp_path / "cache"
    expected = list(open_volumes(cases, SPACING, cache))
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    for found, wanted in zip(open_volumes(cases, SPACING, cache), expected, strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_image_that_cannot_be_normalised_is_named(
    on_disk: bool, pristine_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise ValueError("case_000.nii.gz: found intensities that cannot be normalised")

    monkeypatch.setattr(preparing, "load_volumes", refuse)
    with pytest.raises(ValueError, match=r"case_000\.nii\.gz: found intensities"):
        open_volumes(read_dataset(pristine_data).train, None, tmp_path / "cache" if on_disk else None)[0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_windows_are_the_same_for_any_number_of_workers(on_disk: bool, pristine_data: Path, tmp_path: Path) -> None:
    cases = read_dataset(pristine_data).train
    volumes = open_volumes(cases, SPACING, tmp_path / "cache" if on_disk else None)
    drawn = {}
    for workers in (0, 1, 2):
        plan = Plan(5, 2, 1e-3, 0, (16, 16, 16), flips=True, accumulate=2, workers=workers)
        drawn[workers] = list(windows(Sampler(volumes, plan), 1))
    assert len(drawn[0]) == 4
    for found in (drawn[1], drawn[2]):
        for (image, label), (wanted_image, wanted_label) in zip(found, drawn[0], strict=True):
            assert torch.equal(image, wanted_image)
            assert torch.equal(label, wanted_label)


class Alive:
    """Counts the volumes that are alive whenever one is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Volume]] = []
        self.most = 0
        build = Volume.__init__

        def init(volume: Volume, *given: object, **named: object) -> None:
            build(volume, *given, **named)
            self.made.append(weakref.ref(volume))
            self.most = max(self.most, sum(reference() is not None for reference in self.made))

        monkeypatch.setattr(Volume, "__init__", init)


def test_with_a_cache_no_more_than_two_volumes_are_held_at_once_and_the_result_is_the_same(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three for training and two for validation: training, scoring, selecting and drawing take one at a time."""
    chosen = settings(methods=("head",), steps=3, select="best", flips=True)
    finetune(chosen, tmp_path / "kept")
    with monkeypatch.context() as patch:
        alive = Alive(patch)
        finetune(
            settings(methods=("head",), steps=3, select="best", flips=True, cache=tmp_path / "c"), tmp_path / "run"
        )
    assert len(alive.made) > 20
    assert alive.most <= 2  # one that is left and one that is read
    for name in ("head/seed0/adapter.safetensors", "head/seed0/cases.csv", "head/seed0/metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
