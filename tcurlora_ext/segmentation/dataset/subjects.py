"""The subjects that cases are of, and a draw of a few of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

BIDS = r"^(sub-[A-Za-z0-9]+)"


def by_subject(names: Sequence[str], pattern: str | None) -> list[list[int]]:
    """Indices of cases, one list for each subject, in the order in which the subjects come first.

    Args:
        names: Of the cases.
        pattern: Regular expression whose first group is the subject in a name; None: that of BIDS, ``sub-01_...``. A
            name without it is a subject of its own.
    """
    subjects: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(names):
        found = re.search(pattern or BIDS, name)
        subjects.setdefault(("subject", found[1]) if found else ("case", name), []).append(index)
    return list(subjects.values())


def check_pattern(pattern: str | None) -> None:
    """Raise ValueError unless it is None or a regular expression with a group."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"subject-pattern: found '{pattern}' ({error})") from None
    if not groups:
        raise ValueError(f"subject-pattern: found '{pattern}' without a group, expected one in ()")


def few_subjects(names: Sequence[str], shots: int, seed: int, pattern: str | None) -> list[int]:
    """Indices of the cases of so many subjects, in their order; fewer of the same draw are among them.

    Args:
        names: Of the cases.
        shots: How many subjects.
        seed: Of the draw.
        pattern: As for :func:`by_subject`.

    Raises:
        ValueError: There are fewer subjects, or `shots` is below 1.
    """
    subjects = by_subject(names, pattern)
    if not 1 <= shots <= len(subjects):
        raise ValueError(f"shots: found {shots}, expected 1 to {len(subjects)}, the number of training subjects")
    order = np.random.default_rng([seed, 5]).permutation(len(subjects))[:shots]
    return sorted(index for subject in order.tolist() for index in subjects[subject])
