"""Result files: one per set of cases in a device's folder, one row per case and variant, with versions and commit."""

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
    log: Callable[[str], None] = print,
    show: Callable[[list[Row]], None] = lambda rows: None,
) -> Path:
    """Run a set of cases, or some of them, and write <output>/<device>/<name>.csv after every case.

    Args:
        name: Of the set, a key of ``SETS``.
        device: Where it runs.
        output: The folder of results.
        cases: These cases only: their rows replace the old ones in the file. None: the whole set, into a new file.
        rounds: As in :func:`tcurlora_ext.bench.run.run`, like ``keep`` and ``log``.
        keep: Whether a variant of a case is measured.
        log: Called with a line of text for every case that is skipped.
        show: Called with the rows of each case.

    Returns:
        The file's path.
    """
    origin = provenance(device)
    path = output / folder_name(origin["device"]) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_csv(path) if cases is not None and path.exists() else []
    for found in run(SETS[name]() if cases is None else cases, device, rounds, keep, log):
        new = [origin | {column: str(cell) for column, cell in row.items()} for row in found]
        measured = set(map(key, new))
        at = next((place for place, row in enumerate(rows) if key(row) in measured), len(rows))
        rows = [row for row in rows if key(row) not in measured]
        rows[at:at] = new
        write_csv(path, [{column: row.get(column, "") for column in new[0]} for row in rows])
        show(new)
    return path


def write_host(device: torch.device, output: Path = RESULTS, rounds: int = ROUNDS) -> list[Row]:
    """Measure the host's time for a call, write <output>/<device>/host.csv and return its rows."""
    origin = provenance(device)
    path = output / folder_name(origin["device"]) / "host.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [origin | row for row in host_times(device, rounds)]
    write_csv(path, rows)
    return rows


def selected(cases: Iterable[Case], words: Sequence[str]) -> list[Case]:
    """The cases whose id contains one of the words. Raises ValueError where none does."""
    cases = list(cases)
    found = [case for case in cases if any(word in case.id for word in words)]
    if not found:
        known = ", ".join(dict.fromkeys(case.name for case in cases))
        raise ValueError(f"--cases: found none with {' or '.join(words)}, expected part of {known}")
    return found
