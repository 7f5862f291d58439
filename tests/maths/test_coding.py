"""Columns in few bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcurlora_ext.maths import coding

# 1 - cos^2 of the angle between normal random columns and their codes: 1 - 2/pi for signs, and the distortion of a
# uniform quantiser of a normal variable (Max 1960) for 2 and 4 bits.
LOST = {1: 0.363, 2: 0.119, 4: 0.0117, 8: 3e-4, 16: 1e-8, 32: 1e-13}


@given(st.sampled_from(coding.BITS), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_what_is_packed_is_decoded(bits: int, n: int, k: int, seed: int) -> None:
    columns = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    levels = coding.rounded(columns, bits)
    packed = coding.pack(levels, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-n * k * bits // 8)
    assert torch.equal(coding.decode(packed, bits, (n, k)), levels.double())


@pytest.mark.parametrize("bits", coding.BITS)
def test_a_code_turns_a_column_no_more_than_its_bits_explain(bits: int) -> None:
    columns = torch.randn(4000, 3, dtype=torch.float64)
    levels = coding.rounded(columns, bits).double()
    cos = (columns * levels).sum(0) / (columns.norm(dim=0) * levels.norm(dim=0))
    assert float((1 - cos.square()).max()) < 1.1 * LOST[bits]


def test_one_bit_is_the_sign() -> None:
    columns = torch.randn(50, 3)
    assert torch.equal(coding.rounded(columns, 1), torch.where(columns >= 0, 1, -1).to(torch.int32))


def test_the_size_of_a_column_does_not_matter() -> None:
    columns = torch.randn(50, 3, dtype=torch.float64)
    assert torch.equal(coding.rounded(columns, 4), coding.rounded(columns * 2.0**20, 4))


def test_another_number_of_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="bits is 3, expected one of 1, 2, 4"):
        coding.rounded(torch.ones(2, 2), 3)


def test_another_number_of_bytes_is_refused() -> None:
    packed = coding.pack(coding.rounded(torch.randn(8, 2), 2), 2)
    with pytest.raises(ValueError, match="expected 4 bytes"):
        coding.decode(packed[:-1], 2, (8, 2))
