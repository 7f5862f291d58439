"""What all processes run: every function marked ``@case``, once per entry, with a folder that they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..entries import ENTRIES, Entry

CASES: dict[str, Callable[[Path], None]] = {}


Case = Callable[[Entry, Path], None]


def name_of(function: Case, entry: str) -> str:
    return f"{function.__name__}, {entry}"


def cases_of(*entries: str) -> Callable[[Case], Case]:
    """The decorator for cases of these entries alone."""

    def register(function: Case) -> Case:
        for name in entries:
            CASES[name_of(function, name)] = partial(function, ENTRIES[name])
        return function

    return register


case = cases_of(*ENTRIES)
