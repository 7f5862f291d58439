"""Orthonormal columns: a QR with a positive diagonal, to the same bits whatever sums them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tcurlora_ext.maths.orthonormal import orthonormal_blocks, orthonormal_columns
from tcurlora_ext.maths.transforms import TRANSFORMS

SCRIPT = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from tcurlora_ext.maths.orthonormal import orthonormal_columns
generator = torch.Generator().manual_seed(0)
found = hashlib.sha256()
for values in (torch.randn(5000, 12, dtype=torch.float64, generator=generator),
               torch.randint(0, 2, (5000, 12), generator=generator).double() * 2 - 1):
    for result in orthonormal_columns(values):
        found.update(result.contiguous().numpy().data)
print(found.hexdigest())
"""


def test_it_is_the_qr_with_a_positive_diagonal() -> None:
    X = torch.randn(300, 16, dtype=torch.float64) * torch.logspace(-3, 3, 16, dtype=torch.float64)
    Q, T = orthonormal_columns(X)
    q, r = torch.linalg.qr(X)
    torch.testing.assert_close(Q, q * r.diagonal().sign(), rtol=0, atol=1e-11)
    torch.testing.assert_close(Q.T @ Q, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close(X @ T, Q)
    assert torch.equal(T, T.triu())
    assert bool((T.diagonal() > 0).all())


def test_the_first_columns_depend_on_the_first_alone() -> None:
    X = torch.randn(50, 8, dtype=torch.float64)
    Q, _ = orthonormal_columns(X)
    first, _ = orthonormal_columns(X[:, :3])
    assert torch.equal(Q[:, :3], first)


def test_the_order_of_the_sums_does_not_matter() -> None:
    X = torch.randn(4000, 6, dtype=torch.float64)
    order = torch.randperm(len(X))
    Q, T = orthonormal_columns(X)
    shuffled, same = orthonormal_columns(X[order])
    assert torch.equal(T, same)
    assert torch.equal(Q[order], shuffled)


def test_the_number_of_threads_does_not_matter() -> None:
    results = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, threads], check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "2", "5")
    }  # fmt: skip
    assert len(results) == 1


@pytest.mark.parametrize(
    "columns",
    [
        torch.zeros(10, 2),
        torch.ones(10, 2),
        torch.cat([torch.eye(10)[:, :2], torch.eye(10)[:, :2].sum(1, keepdim=True)], 1),
        torch.cat([torch.eye(10)[:, :1], torch.eye(10)[:, :1] + 1e-8 * torch.eye(10)[:, 1:2]], 1),
    ],
    ids=["zero", "equal", "sum", "nearly equal"],
)
def test_dependent_columns_are_refused_with_their_number(columns: Tensor) -> None:
    with pytest.raises(ValueError, match=r"column \d"):
        orthonormal_columns(columns.double())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5])
def test_blocks_are_orthonormal_at_every_frequency(transform: str, slices: int) -> None:
    along = TRANSFORMS[transform]
    factor = torch.randn(slices, 20, 4, dtype=torch.float64)
    made, triangle = orthonormal_blocks(along.fold(factor), along, slices)
    spectrum, _ = along.spectrum(along.unfold(made, slices))
    unit = torch.eye(4, dtype=spectrum.dtype).expand(len(spectrum), -1, -1)
    torch.testing.assert_close(spectrum.mH @ spectrum, unit, rtol=0, atol=1e-11)
    before, _ = along.spectrum(factor)
    turned, _ = along.spectrum(along.unfold(triangle, slices))
    torch.testing.assert_close(before @ turned, spectrum)
