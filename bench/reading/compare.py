"""Two result files compared: which variants became faster or slower, and which differences are noise.

A machine's speed drifts: the same program takes a few per cent more or less an hour later. A variant is therefore
judged by the ratio of its time to the frozen network's, both measured in the same rounds, and by how much this ratio
varies over the rounds of each file. The frozen network itself is judged by its time.

The rule. Each file gives an interval, from the 20th to the 80th percentile over its rounds. Where the two intervals do
not overlap and the median changed by ``least`` (10 %) or more, the row is "faster" or "slower", otherwise "noise".
Percentiles of fewer than 14 rounds are unreliable, so with n < 14 rounds the interval is stretched about its median by
14 / n. Where the frozen network's own time changed by 25 % or more although device and torch are the same, something
else slowed the machine during one of the two runs: all variants of that case are "disturbed", without a verdict.

False alarms. If nothing changed and rounds are independent, the intervals do not overlap in 0.02 % of rows with 20
rounds, 0.2 % with 14, 0.3 % with 5 or 7 (stretched; 4 % unstretched with 7) and 1 % with 3, by simulation of normal,
heavy-tailed and skewed times. Two runs differ by more than their rounds show, though, for example by where memory was
allocated. In two runs of one commit on two shared cores, on layers of UNETR with 64 and 256 tokens, 1 of 66 rows (7
rounds) and 1 of 85 (15 rounds) were called a change; with a ``least`` of 2 % it would have been 1 and 7. These rows are
without those of "disturbed" cases: there one run was 3 to 40 times as slow, as beside another busy process, and ratios
changed by half.

Missed changes. With 20 rounds a shift of 1.7 standard deviations of single rounds is found in 6 of 10 rows and one of
2.5 almost always; with 7 rounds one of 4 in 9 of 10; none below ``least`` is found. Every ratio contains the frozen
network's time: where that became faster, for example by another version of torch, all variants look slower. A ratio of
whole steps also dilutes a change in the adapter alone. To find a small difference run each commit twice: it is there if
both runs of one commit lie apart from both of the other.

Memory, launches, counts and trained parameters do not vary from run to run: any difference is listed as a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tcurlora_ext.io.table import text_table

from ..names import FROZEN
from ..rows import PROVENANCE, Row, key, number, read_failures, read_results, title, value

COUNTED = ("peak_mib", "saved_mib", "adapter_mib", "trained", "launches", "gflop", "fewest_mib")
ENOUGH_ROUNDS = 14  # with fewer, intervals are stretched
LEAST_SHIFT = 0.1  # a smaller relative change of the median is noise
STEADY = 1.25  # a case whose frozen network's time changed by this factor was disturbed
FASTER, SLOWER, NOISE, DISTURBED, UNKNOWN = "faster", "slower", "noise", "disturbed", "no times"


@dataclass(frozen=True)
class Pair:
    """The rows of one case and variant in A and B.

    Attributes:
        a: In A.
        b: In B.
        verdict: "faster", "slower", "noise", "disturbed" or "no times".
        changes: Columns of :data:`COUNTED` that differ: name -> (text in A, text in B).
    """

    a: Row
    b: Row
    verdict: str
    changes: dict[str, tuple[str, str]]

    @property
    def noise(self) -> bool:
        """Whether times differ by noise only, and no count differs."""
        return self.verdict == NOISE and not self.changes


@dataclass(frozen=True)
class Comparison:
    """Two result files compared row by row.

    Attributes:
        a: The first file.
        b: The second.
        notes: Other differences between the files: devices, versions, dtypes, rounds; rows that failed, in either.
        pairs: Rows that are in both.
        only_a: Rows that are in A only.
        only_b: Rows that are in B only.
    """

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
        """The comparison as text: pairs that differ, or all of them."""
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
    """Compare two result files.

    Args:
        a: The first file; pairs are in its order.
        b: The second.
        least: Relative changes of the median below this are noise.

    Raises:
        OSError: A file is not there or cannot be read.
        ValueError: A file is not a result file; the message says what was found and what was expected.
    """
    found_a, found_b = ({key(row): row for row in read_results(path)} for path in (a, b))
    frozen = {title(row): row for row in found_a.values() if row["variant"] == FROZEN}
    disturbed = {
        title(row) for row in found_b.values() if row["variant"] == FROZEN and _jumped(frozen.get(title(row)), row)
    }
    pairs = [
        Pair(row, found_b[at], _verdict(row, found_b[at], title(row) in disturbed, least), _changes(row, found_b[at]))
        for at, row in found_a.items()
        if at in found_b
    ]
    return Comparison(
        a, b, _notes(list(found_a.values()), list(found_b.values())) + _failures(a, b), pairs,
        [row for at, row in found_a.items() if at not in found_b],
        [row for at, row in found_b.items() if at not in found_a],
    )  # fmt: skip


def _jumped(a: Row | None, b: Row) -> bool:
    """Whether the frozen network's time changed by more than drift, on the same device with the same torch."""
    if a is None or (a["device"], a["torch"]) != (b["device"], b["torch"]) or not (a["median_ms"] and b["median_ms"]):
        return False
    ratio = number(b, "median_ms") / number(a, "median_ms")
    return max(ratio, 1 / ratio) >= STEADY


def _verdict(a: Row, b: Row, disturbed: bool, least: float) -> str:
    columns = ("p20_ms", "median_ms", "p80_ms")
    if a["variant"] != FROZEN:
        columns = ("over_frozen_p20", "over_frozen", "over_frozen_p80")
    if not all(row[column] for row in (a, b) for column in columns):
        return UNKNOWN
    if disturbed and a["variant"] != FROZEN:
        return DISTURBED
    (low_a, mid_a, high_a), (low_b, mid_b, high_b) = (_interval(row, columns) for row in (a, b))
    if abs(mid_b / mid_a - 1) < least:
        return NOISE
    if high_b < low_a:
        return FASTER
    return SLOWER if high_a < low_b else NOISE


def _interval(row: Row, columns: tuple[str, str, str]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile, stretched where there are few rounds."""
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


def _failures(a: Path, b: Path) -> list[str]:
    return [f"failed in {name}: {line}" for name, path in (("A", a), ("B", b)) for line in read_failures(path)]


def _table(pairs: list[Pair]) -> str:
    """One table with a heading above the rows of each case."""
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
    if row["variant"] == FROZEN or not row["over_frozen_p20"]:
        return ""
    return f"{number(row, 'over_frozen_p20'):.2f} .. {number(row, 'over_frozen_p80'):.2f}"
