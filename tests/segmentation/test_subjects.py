"""A few subjects of the training cases."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tcurlora_ext.segmentation.dataset import read_dataset
from tcurlora_ext.segmentation.dataset.subjects import check_pattern, few_subjects


def test_subjects_are_drawn_whole_and_fewer_are_among_more() -> None:
    names = [f"sub-{index // 2}_{index}" for index in range(10)]
    drawn = [few_subjects(names, count, 3, None) for count in range(1, 6)]
    for count, chosen in enumerate(drawn, 1):
        assert len({names[index][:5] for index in chosen}) == count
        assert len(chosen) == 2 * count
    assert all(set(fewer) < set(more) for fewer, more in pairwise(drawn))
    assert drawn[4] == list(range(10))
    assert few_subjects(names, 2, 3, r"_(\d)") != drawn[1]  # each case a subject
    assert any(few_subjects(names, 2, seed, None) != drawn[1] for seed in range(9))
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"shots: found {count}, expected 1 to 5, the number of training subjects"):
            few_subjects(names, count, 3, None)


def test_the_data_set_has_their_cases_alone(pristine_data: Path) -> None:
    whole, two = read_dataset(pristine_data), read_dataset(pristine_data, shots=2)
    assert two.val == whole.val
    assert len(two.train) == 2
    assert set(two.train) < set(whole.train)
    assert two.fingerprint != whole.fingerprint
    assert "those of 2 subjects" in two.division
    one = read_dataset(pristine_data, shots=1, subject_pattern="(case)")
    assert one.train == whole.train


def test_a_pattern_needs_a_group() -> None:
    check_pattern(None)
    check_pattern("(a)")
    for wrong, message in (("a", "without a group"), ("(", "subject-pattern: found")):
        with pytest.raises(ValueError, match=message):
            check_pattern(wrong)
