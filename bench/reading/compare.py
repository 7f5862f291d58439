"""Two result files side by side: what became faster or slower, and what is only noise.

Machines drift: the same program takes a few per cent more or less an hour later. So a verdict on a form rests on its
time over the frozen layer's, measured in the same rounds, and on how that ratio spreads over the rounds of each file.

The rule. Each file gives an interval: the 20th to the 80th percentile of the ratio over the rounds, for the frozen
layer itself of its time. Where intervals lie apart and the median moved by ``least`` (10 %) or more, a row is "faster"
or "slower", otherwise "noise". Of n < 14 rounds the interval is stretched about its median by 14 / n, because so few
rounds leave the percentiles themselves to chance. Where the floor of a case moved by a quarter or more on the same
device and torch, the machine was in another state and the case's forms are "disturbed": no verdict.

How sound it is. If nothing changed and rounds are independent, intervals of 20 rounds lie apart in 0.02 % of rows, of
14 in 0.2 %, of 5 or 7, stretched, in 0.3 %, of 3 in 1 % (by simulation of normal, heavy-tailed and skewed times; of 7
rounds unstretched it would be 4 %). But two runs differ by more than their rounds show: where memory came to lie, what
else runs. Two runs of one commit on two shared cores, layers of UNETR on 64 and 256 tokens: of cases whose floor
stayed, 1 of 66 rows (7 rounds) and 1 of 85 (15 rounds) were called a change, with 2 % in place of 10 % 1 and 7. In the
other cases one run was 3 to 40 times as slow, as beside another busy process, and ratios moved by half: hence
"disturbed".

What it does not see. With 20 rounds a shift of 1.7 standard deviations of single rounds is found in 6 of 10 rows, one
of 2.5 almost always; with 7 rounds one of 4 in 9 of 10; and none below ``least``. The floor is in every ratio: if the
frozen layer itself became faster, as by another version of torch, all forms look slower. A verdict on the floor has the
drift of the machine in it. A ratio of whole steps also dilutes what changed in the adapter alone. For a small
difference run each commit twice: it is there if both runs of one lie apart from both of the other.

Memory, launches, counts and trained numbers do not depend on chance: any difference of them is listed as a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tcurlora_ext.io.table import text_table

from ..rows import PROVENANCE, Row, key, number, read_results, title, value
from ..variants import FLOOR

COUNTED = ("peak_mib", "saved_mib", "adapter_mib", "trained", "launches", "gflop", "fewest_mib")
ENOUGH_ROUNDS = 14  # for the percentiles as they are
LEAST_SHIFT = 0.1  # what is no noise moves by as much
STEADY = 1.25  # a floor that moved by this factor was measured on another machine, as it were
FASTER, SLOWER, NOISE, DISTURBED, UNKNOWN = "faster", "slower", "noise", "disturbed", "no times"


@dataclass(frozen=True)
class Pair:
    """The rows of one case and variant in A and B.

    changes   counted columns that differ: name -> (in A, in B), as text
    """

    a: Row
    b: Row
    verdict: str
    changes: dict[str, tuple[str, str]]

    @property
    def noise(self) -> bool:
        """Whether nothing is to be seen in it."""
        return self.verdict == NOISE and not self.changes


@dataclass(frozen=True)
class Comparison:
    """``notes`` says what else differs: devices, versions, dtypes."""

    a: Path
    b: Path
    notes: list[str]
    pairs: list[Pair]
    only_a: list[Row]
    only_b: list[Row]

    def count(self, verdict: str) -> int:
        """How many pairs have a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)

    def text(self, everything: bool = False) -> str:
        """The comparison to read: what differs, or every pair."""
        shown = [pair for pair in self.pairs if everything or not pair.noise]
        parts = [f"A  {self.a}\nB  {self.b}", *(f"note: {note}" for note in self.notes)]
        if shown:
            parts.append(_table(shown))
        for name, rows in (("A", self.only_a), ("B", self.only_b)):
            if rows:
                lines = [f"  {title(row)}, {row['variant']}" for row in rows]
                parts.append("\n".join([f"only in {name}:", *lines]))
        counts = ", ".join(f"{self.count(verdict)} {verdict}" for verdict in (FASTER, SLOWER, DISTURBED, NOISE))
        changed = sum(bool(pair.changes) for pair in self.pairs)
        last = f"{len(self.pairs)} rows in both: {counts}; {changed} with other memory or counts"
        hidden = len(self.pairs) - len(shown)
        return "\n\n".join([*parts, last + (f" ({hidden} rows of noise not shown)" if hidden else "")])


def compare(a: Path, b: Path, least: float = LEAST_SHIFT) -> Comparison:
    """What differs between two result files, in A's order; ``least`` is the part by which a change moves a median.

    Raises OSError or ValueError naming the file, what was found and what was expected.
    """
    found_a, found_b = ({key(row): row for row in read_results(path)} for path in (a, b))
    floors = {title(row): row for row in found_a.values() if row["variant"] == FLOOR}
    disturbed = {
        title(row) for row in found_b.values() if row["variant"] == FLOOR and _moved(floors.get(title(row)), row)
    }
    pairs = [
        Pair(row, found_b[at], _verdict(row, found_b[at], title(row) in disturbed, least), _changes(row, found_b[at]))
        for at, row in found_a.items()
        if at in found_b
    ]
    return Comparison(
        a, b, _notes(list(found_a.values()), list(found_b.values())), pairs,
        [row for at, row in found_a.items() if at not in found_b],
        [row for at, row in found_b.items() if at not in found_a],
    )  # fmt: skip


def _moved(a: Row | None, b: Row) -> bool:
    """Whether a floor's time says that one program ran on one device in two states."""
    if a is None or (a["device"], a["torch"]) != (b["device"], b["torch"]) or not (a["median_ms"] and b["median_ms"]):
        return False
    ratio = number(b, "median_ms") / number(a, "median_ms")
    return max(ratio, 1 / ratio) >= STEADY


def _verdict(a: Row, b: Row, disturbed: bool, least: float) -> str:
    columns = ("p20_ms", "median_ms", "p80_ms")
    if a["variant"] != FLOOR:
        columns = ("over_frozen_p20", "over_frozen", "over_frozen_p80")
    if not all(row[column] for row in (a, b) for column in columns):
        return UNKNOWN
    if disturbed and a["variant"] != FLOOR:
        return DISTURBED
    (low_a, mid_a, high_a), (low_b, mid_b, high_b) = (_interval(row, columns) for row in (a, b))
    if abs(mid_b / mid_a - 1) < least:
        return NOISE
    if high_b < low_a:
        return FASTER
    return SLOWER if high_a < low_b else NOISE


def _interval(row: Row, columns: tuple[str, str, str]) -> tuple[float, float, float]:
    """The stretched interval with its median in the middle."""
    low, middle, high = (number(row, column) for column in columns)
    stretch = max(1.0, ENOUGH_ROUNDS / number(row, "rounds"))
    return middle - stretch * (middle - low), middle, middle + stretch * (high - middle)


def _changes(a: Row, b: Row) -> dict[str, tuple[str, str]]:
    return {name: (a[name], b[name]) for name in COUNTED if value(a, name) != value(b, name)}


def _notes(a: list[Row], b: list[Row]) -> list[str]:
    notes = []
    for column in (*PROVENANCE, "dtype", "rounds"):
        in_a, in_b = (", ".join(dict.fromkeys(row[column] or "none" for row in rows)) for rows in (a, b))
        if in_a != in_b:
            notes.append(f"{column}: {in_a} in A, {in_b} in B")
    return notes


def _table(pairs: list[Pair]) -> str:
    """One table, its columns aligned throughout, under a heading for each case."""
    header = ("", "A, ms", "B, ms", "B/A", "A over frozen", "B over frozen", "", "changes")
    cells = [
        (
            f"  {pair.a['variant']}", pair.a["median_ms"], pair.b["median_ms"], _ratio(pair.a, pair.b), _over(pair.a),
            _over(pair.b), pair.verdict,
        )
        for pair in pairs
    ]  # fmt: skip
    lines = text_table(header[:-1], cells).split("\n")
    out, last = [lines[0]], ""
    for pair, line in zip(pairs, lines[1:], strict=True):
        if title(pair.a) != last:
            last = title(pair.a)
            out.append(last)
        changed = [f"{name} {_or_none(before)} -> {_or_none(after)}" for name, (before, after) in pair.changes.items()]
        out.append("  ".join([line, *changed]))
    return "\n".join(out)


def _or_none(text: str) -> str:
    return text or "none"


def _ratio(a: Row, b: Row) -> str:
    before, after = value(a, "median_ms"), value(b, "median_ms")
    return f"{after / before:.3f}" if before and after else ""


def _over(row: Row) -> str:
    if row["variant"] == FLOOR or not row["over_frozen_p20"]:
        return ""
    return f"{number(row, 'over_frozen_p20'):.2f} .. {number(row, 'over_frozen_p80'):.2f}"
