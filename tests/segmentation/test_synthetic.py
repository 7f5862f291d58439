"""The embedded subjects: the same for the same seed, anatomy in the labels, contrasts in order, no network."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from tcurlora_ext.segmentation.dataset import read_dataset, synthetic

pytest.importorskip("nilearn")


def test_the_same_arguments_give_the_same_bits() -> None:
    for first, again in zip(
        synthetic.make_subject("target", 3, 1), synthetic.make_subject("target", 3, 1), strict=True
    ):
        assert np.array_equal(first, again)


def test_subjects_seeds_and_domains_differ() -> None:
    labels = [synthetic.make_subject(*key)[1] for key in (("target", 0, 0), ("target", 0, 1), ("target", 1, 0))]
    assert all((labels[0] != other).mean() > 0.05 for other in labels[1:])


@pytest.mark.parametrize(("domain", "order"), [("source", (2, 1)), ("target", (1, 2))])
def test_labels_are_a_brain_and_the_contrast_is_the_domains(domain: str, order: tuple[int, int]) -> None:
    image, label = synthetic.make_subject(domain, 0, 0)
    assert image.shape == label.shape
    assert set(np.unique(label)) == {0, 1, 2}
    litres = [(label == value).sum() * 4.0**3 / 1e6 for value in (1, 2)]
    assert 0.6 < litres[0] < 1.4  # grey matter of an adult: about 0.7 to 1.2 with the MNI average's generous maps
    assert 0.3 < litres[1] < 0.9
    bright, dark = (image[label == value].mean() for value in order)
    assert bright > dark > image[label == 0].mean()


def test_the_template_is_read_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    synthetic.template.cache_clear()
    maps, residual = synthetic.template()
    assert np.allclose(maps.sum(0), 1, atol=1e-5)
    assert residual.shape == maps.shape[1:]


def test_the_files_pass_the_readers_checks(tmp_path: Path) -> None:
    found = read_dataset(synthetic.write_domain(tmp_path / "target", "target", 2, 1, spacing=8.0))
    assert (len(found.train), len(found.val)) == (2, 1)
    assert found.classes == ("grey matter", "white matter")
