"""Fingerprints differ between different weights, and agree for rounded copies."""

from __future__ import annotations

import pytest
import torch

from tcurlora_ext.maths.fingerprint import fingerprint, mismatch


def test_the_same_weights_have_the_same_fingerprint_in_any_layout() -> None:
    W = torch.randn(3, 40, 50)
    turned = W.transpose(1, 2).contiguous().transpose(1, 2)
    assert mismatch(fingerprint(W), fingerprint(turned), "float32", torch.float32) == []
    assert fingerprint(W).shape[0] == 3
    assert fingerprint(W).dtype == torch.float64


@pytest.mark.parametrize("at", [(0, 0), (39, 49), (17, 3)])
def test_one_changed_entry_is_seen_in_its_slice(at: tuple[int, int]) -> None:
    W = torch.randn(3, 40, 50)
    other = W.clone()
    other[1][at] *= 1.0001
    assert mismatch(fingerprint(W), fingerprint(other), "float32", torch.float32) == [1]


def test_swapped_slices_rows_columns_and_signs_are_seen() -> None:
    W = torch.randn(2, 8, 8)
    for other in (W.flip(0), W.flip(1), W.flip(2), -W, W.mT, W * 1.001):
        assert mismatch(fingerprint(W), fingerprint(other), "float32", torch.float32) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_copy_is_the_same_and_other_weights_are_not(dtype: torch.dtype) -> None:
    W = torch.randn(3, 64, 64)
    name = str(dtype).removeprefix("torch.")
    assert mismatch(fingerprint(W), fingerprint(W.to(dtype)), "float32", dtype) == []
    assert mismatch(fingerprint(W.to(dtype)), fingerprint(W), name, torch.float32) == []
    other = torch.randn(3, 64, 64)
    assert mismatch(fingerprint(W), fingerprint(other.to(dtype)), "float32", dtype) == [0, 1, 2]


def test_zero_weights_have_a_fingerprint() -> None:
    assert bool(torch.isfinite(fingerprint(torch.zeros(1, 4, 4))).all())
