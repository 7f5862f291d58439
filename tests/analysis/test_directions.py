"""What an inspection says of a subspace, against NumPy's singular vectors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.analysis.directions import inspect_subspace, subspace_json

OWN: dict[str, Any] = {"stack_by": "none", "transform": "identity"}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))).double()


def changed(first: Tensor) -> nn.Sequential:
    """The base with a change of rank 2 along given directions in every layer."""
    model = base()
    with torch.no_grad():
        for layer in model:
            layer.weight += 0.1 * first
    return model


def subspace_of(change: Tensor, **options: Any) -> tcur.Subspace:
    config = tcur.TCURConfig(rank=2, target_modules=r"\d", factors="learned", **options)
    return tcur.factors_of_change(base(), config, changed(change), bits=32)


def test_directions_of_the_weights_themselves_have_cosine_one_and_others_less() -> None:
    U, _, Vh = np.linalg.svd(base()[1].weight.detach().numpy())
    of_weights = torch.from_numpy(U[:, :1] @ Vh[:1] + 0.5 * U[:, 5:6] @ Vh[6:7])
    subspace = subspace_of(of_weights, **OWN)
    model = tcur.inject(base(), subspace=subspace)
    found = {one.names[0]: one for one in inspect_subspace(subspace, model)}
    one = found["1"]
    assert one.left_cosines == [pytest.approx(1, abs=1e-6)]
    assert one.right_cosines == [pytest.approx(1, abs=1e-6)]
    for name, other in found.items():
        W = base()[int(name)].weight.detach().numpy()
        left, _, right = np.linalg.svd(W)
        for cosines, leading, own in (
            (other.left_cosines, left[:, :2], np.stack([U[:, 0], U[:, 5]], 1)),
            (other.right_cosines, right[:2].T, np.stack([Vh[0], Vh[6]], 1)),
        ):
            expected = np.linalg.svd(leading.T @ own, compute_uv=False)[0]
            assert cosines == [pytest.approx(expected, abs=1e-5)]
        assert other.change == pytest.approx(float((0.1 * of_weights).norm()) / np.linalg.norm(W))
        assert other.energy == pytest.approx(1)
        assert (other.shape, other.rank, other.names) == ((12, 12), (2, 2), [name])


@pytest.mark.parametrize("frequencies", [None, 2])
def test_coupled_slices_have_a_cosine_for_each_frequency(frequencies: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    config = tcur.TCURConfig(rank=2, target_modules=r"\d", factors="learned", frequencies=frequencies)
    other = base()
    with torch.no_grad():
        for at, layer in enumerate(other):
            layer.weight += 0.1 * change.roll(at, 0) + at * change.roll(at, 1)
    subspace = tcur.factors_of_change(base(), config, other, bits=32)
    (one,) = inspect_subspace(subspace, tcur.inject(base(), subspace=subspace))
    W = np.stack([layer.weight.detach().numpy() for layer in base()])
    D = np.stack([layer.weight.detach().numpy() for layer in other]) - W
    expected = []
    for of_weights, of_change in zip(np.fft.rfft(W, axis=0), np.fft.rfft(D, axis=0), strict=True):
        leading, directions = (np.linalg.svd(part)[0][:, :2] for part in (of_weights, of_change))
        expected.append(np.linalg.svd(leading.conj().T @ directions, compute_uv=False)[0])
    assert one.left_cosines == pytest.approx(expected[:frequencies], abs=1e-5)
    assert len(one.right_cosines or []) == len(expected[:frequencies])


def test_without_base_weights_there_are_no_angles() -> None:
    subspace = subspace_of(torch.eye(12, dtype=torch.float64), **OWN)
    found = inspect_subspace(subspace)
    assert all(one.left_cosines is one.right_cosines is None for one in found)
    content = json.loads(json.dumps(subspace_json(subspace, found)))
    assert content["digest"] == subspace.digest
    assert content["bytes"] == 4 * 2 * 12 * 2 * 4
    assert content["parameters"] == 4 * 4
