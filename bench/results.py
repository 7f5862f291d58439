"""Files of results: one a set in the folder of a device, a row a case and form, every row with versions and commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tcurlora_ext.io.records import read_csv, write_csv

from .cases import SETS, Case
from .devices import folder_name, provenance
from .host import host_times
from .rows import Row, key
from .run import Keep, run

RESULTS = Path("bench/results")
ROUNDS = 9


def write_set(
    name: str,
    device: torch.device,
    output: Path = RESULTS,
    cases: Sequence[Case] | None = None,
    rounds: int = ROUNDS,
    keep: Keep = lambda variant, case: True,
    say: Callable[[str], None] = print,
    show: Callable[[list[Row]], None] = lambda rows: None,
) -> Path:
    """Run a set, or some of its cases, and write <output>/<device>/<name>.csv after every case; returns its path.

    ``show`` gets the rows of each case. The whole set starts a new file; some cases take the place of their old rows.
    """
    about = provenance(device)
    path = output / folder_name(about["device"]) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_csv(path) if cases is not None and path.exists() else []
    for found in run(SETS[name]() if cases is None else cases, device, rounds, keep, say):
        new = [about | {column: str(cell) for column, cell in row.items()} for row in found]
        measured = set(map(key, new))
        at = next((place for place, row in enumerate(rows) if key(row) in measured), len(rows))
        rows = [row for row in rows if key(row) not in measured]
        rows[at:at] = new
        write_csv(path, [{column: row.get(column, "") for column in new[0]} for row in rows])
        show(new)
    return path


def write_host(device: torch.device, output: Path = RESULTS, rounds: int = ROUNDS) -> list[Row]:
    """Measure the host's time for a call, write <output>/<device>/host.csv and return its rows."""
    about = provenance(device)
    path = output / folder_name(about["device"]) / "host.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [about | row for row in host_times(device, rounds)]
    write_csv(path, rows)
    return rows


def selected(cases: Iterable[Case], words: Sequence[str]) -> list[Case]:
    """The cases whose id holds one of the words. Raises ValueError where none does."""
    cases = list(cases)
    found = [case for case in cases if any(word in case.id for word in words)]
    if not found:
        known = ", ".join(dict.fromkeys(case.name for case in cases))
        raise ValueError(f"--cases: found none with {' or '.join(words)}, expected part of {known}")
    return found
