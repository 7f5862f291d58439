"""Tables of the docs, written from result files, so that every number in them can be traced to its file.

This module writes the table NAME of FILE, a path from the repository's root, and a line with its origin between two
Markdown comments of a page, which a reader does not see:

    <!-- table: NAME FILE -->
    <!-- end -->

It is run, from the repository's root, by

    python -m tcurlora_ext.bench.reading.tables [--check] README.md docs/*.md
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tcurlora_ext.io.atomic import write_bytes

from ..cases import SETS
from ..entry import run_command
from ..names import DENSE, FROZEN, LORA, PAPER_LORA, STACK, TRANSIENT, operator_variants
from ..rows import PROVENANCE, Row, by_case, labels, number, read_failures, read_results, read_rows, tcur_backend, value
from .ablations import COLUMNS as ABLATIONS
from .ablations import ablations_table
from .comparison import COLUMNS as COMPARISON
from .comparison import comparison_table
from .crossover import crossovers, merge
from .language import COLUMNS as LANGUAGE_COLUMNS
from .language import language_table
from .methods import COLUMNS as METHODS
from .methods import methods_table

COMMAND = "python -m tcurlora_ext.bench.reading.tables"
# The commands that write the files: of measurements, of the tables in COUNTED, of profiles, of trainings.
MEASURE = "tcurlora bench"
COUNT = "python -m tcurlora_ext.bench.scaling"
PROFILE = "python -m tcurlora_ext.bench.profile"
TRAINED = {
    "methods": "python -m tcurlora_ext.bench.learned",
    "language": "python -m tcurlora_ext.bench.language",
    "ablations": "python -m tcurlora_ext.bench.ablations",
    "comparison": "python -m tcurlora_ext.bench.comparison",
}
COUNTED = ("scaling", "scaling-step")
MARKED = re.compile(r"^<!-- table: (.*?) -->\n(.*?)^<!-- end -->$", re.M | re.S)
OPENED = re.compile(r"^\s*<!-- (?:table:|end)", re.M)
ORIGIN = {"rounds": "{} rounds", "torch": "torch {}", "commit": "commit {}"}
STAGES = ("stage", "launches", "time_ms", "least_ms", "gflop", "fewest_mib")
HOST = ("variant", "median_us", "least_us")
SCALING = (
    "model", "method", "layout", "numbers", "base", "gathered", "factors", "trained", "saved", "weights", "gradients",
    "flops_over_base", "compute_s", "transfer_s",
)  # fmt: skip

Table = list[list[str]]  # the header, then rows


def fill(text: str, root: Path) -> str:
    """A page with its tables replaced by those of the files under ``root``.

    Raises:
        ValueError: A comment has no counterpart, a table's name is unknown, or its file is not a result file.
        OSError: A table's file is not there.
    """
    pairs = len(MARKED.findall(text))
    if len(OPENED.findall(text)) != 2 * pairs:
        raise ValueError(
            f"found {len(OPENED.findall(text))} markers in {pairs} pairs, expected each '<!-- table: NAME FILE -->' on "
            "a line of its own to be followed by '<!-- end -->'"
        )
    return MARKED.sub(lambda found: _section(found[1], root), text)


def _section(marker: str, root: Path) -> str:
    words = marker.split()
    if len(words) != 2 or words[0] not in TABLES:
        raise ValueError(f"found table '{marker}', expected a file and before it one of {', '.join(TABLES)}")
    name, file = words
    make, columns = TABLES[name]
    rows = read_results(root / file) if columns is None else read_rows(root / file, columns)
    failed = read_failures(root / file) if columns is None else []
    parts = [f"<!-- table: {name} {file} -->", markdown(make(rows)), _source(name, file, rows)]
    if failed:
        parts.append("\n".join(["Failed, and left out:", "", *(f"- {line}" for line in failed)]))
    return "\n\n".join([*parts, "<!-- end -->"])


def _source(name: str, file: str, rows: list[Row]) -> str:
    """The line with a table's origin: its file, what the cases have in common, device, rounds, versions, commit."""
    if name in TRAINED:
        return f"`{file}`, measured by `{TRAINED[name]}`."
    if name in COUNTED:
        return f"`{file}`, counted by `{COUNT}`."
    shared = labels(rows)[1] if "case" in rows[0] else ""
    stem = Path(file).stem
    command = PROFILE if stem.startswith("profile") else MEASURE
    option = f" --{stem}" if stem in SETS and stem != "quick" else ""
    found = {name: ", ".join(dict.fromkeys(row.get(name, "") for row in rows)) for name in (*PROVENANCE, "rounds")}
    parts = [shared, found["device"], *(text.format(found[name]) for name, text in ORIGIN.items() if found[name])]
    return "; ".join([f"`{file}`, measured by `{command}{option}`", *filter(None, parts)]) + "."


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown, the first column aligned to the left and the others to the right."""
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layers(rows: list[Row]) -> Table:
    """One row per case: the operator, compared with the frozen network, LoRA of rank q and PEFT's LoRA of rank 32."""
    backend = tcur_backend(rows)
    header = [
        "", "q", "frozen, ms", "LoRA of rank q / frozen", "PEFT LoRA r=32 / frozen", f"{backend} / frozen",
        "20th to 80th percentile", f"{backend} / LoRA of rank q", f"{backend} / PEFT LoRA r=32", "share of limit",
    ]  # fmt: skip
    names, _ = labels(rows)
    table = [header]
    for at, variants in by_case(rows).items():
        ours = variants.get(backend)
        if ours is None:
            continue
        spread = f"{_times(ours, 'over_frozen_p20')} to {_times(ours, 'over_frozen_p80')}"
        over = [_times(variants[name], "over_frozen") if name in variants else "" for name in (LORA, PAPER_LORA)]
        table.append([
            names[at], ours["q"], _short(variants[FROZEN], "median_ms"), *over, _times(ours, "over_frozen"), spread,
            _times(ours, "over_lora"), _times(ours, "over_peft_r32"), _share(ours),
        ])  # fmt: skip
    return table


def by_variant(rows: list[Row], cell: Callable[[Row], str]) -> Table:
    """One row per variant and one column per case."""
    cases = by_case(rows)
    names, _ = labels(rows)
    table = [["", *(names[at] for at in cases)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        table += [[variant, *(cell(found[variant]) if variant in found else "" for found in cases.values())]]
    return table


def memory(rows: list[Row]) -> Table:
    """One row per network and variant; single layers and stacks are left out."""
    table = [
        ["", "variant", "extra peak, MiB", "saved for backward, MiB", "adapter, MiB", "trained parameters", "launches"]
    ]
    names, _ = labels(rows)
    for at, variants in by_case([row for row in rows if row["network"] not in ("layer", "stack")]).items():
        for place, row in enumerate(variants.values()):
            amounts = [_short(row, column) for column in ("extra_peak_mib", "saved_mib", "adapter_mib")]
            counts = [f"{int(number(row, column)):,}" for column in ("trained", "launches")]
            table.append([names[at] if place == 0 else "", row["variant"], *amounts, *counts])
    return table


def backends(rows: list[Row]) -> Table:
    """One row per layer in training: times in ms by the operator's backends, and the fastest one's extra time."""
    found = by_case([row for row in rows if (row["network"], row["mode"]) == ("layer", "training")])
    names, _ = labels([row for variants in found.values() for row in variants.values()])
    best = tcur_backend(rows)
    ran = [name for name in operator_variants() if any(name in variants for variants in found.values())]
    table = [["", "frozen, ms", "LoRA of rank q", *ran, f"extra of {best} / extra of LoRA"]]
    for at, variants in found.items():
        if best in variants:
            shown = (FROZEN, LORA, *ran)
            times = [_short(variants[name], "median_ms") if name in variants else "" for name in shown]
            table.append([names[at], *times, _times(variants[best], "extra_over_lora")])
    return table


def summary(rows: list[Row]) -> Table:
    """One row per network and variant: the paper's LoRA, the operator, and tCUR with dW built per layer or stack."""
    best = tcur_backend(rows)
    wanted = {
        PAPER_LORA: "LoRA r=32 (PEFT)",
        best: "tCUR r=8",
        DENSE: "the same, ΔW built",
        STACK: "the same, whole stack built",
    }
    table = [["", "trained parameters", "time / frozen", "extra peak memory, MiB", "extra saved for backward, MiB"]]
    for variants in by_case([row for row in rows if row["network"] not in ("layer", "stack")]).values():
        saved = number(variants[FROZEN], "saved_mib")
        for variant, name in wanted.items():
            if variant in variants:
                row = variants[variant]
                more = f"{number(row, 'saved_mib') - saved:,.0f}"
                trained = f"{int(number(row, 'trained')):,}"
                cells = [trained, _times(row, "over_frozen"), _short(row, "extra_peak_mib"), more]
                table.append([f"{row['case']}: {name}", *cells])
    return table


def growth(sweep: str, mode: str, rows: list[Row]) -> Table:
    """One row per point of a sweep: the frozen layer's time, the variants' time (and FLOPs) over it, extra peaks."""
    backend = tcur_backend([row for row in rows if row["sweep"]])
    names = [LORA, backend, DENSE, TRANSIENT] if mode == "training" else [LORA, backend, DENSE]
    symbol = {"tokens": "T", "rank": "r", "slices": "S", "width": "width"}[sweep]
    table = [[symbol, "frozen, ms", *names, *(f"MiB: {name}" for name in names)]]
    for variants in by_case([row for row in rows if (row["sweep"], row["mode"]) == (sweep, mode)]).values():
        found = [variants.get(name) for name in names]
        frozen = variants[FROZEN]
        point = frozen[{"slices": "stack", "width": "in"}.get(sweep, sweep)]
        times = [f"{_times(row, 'over_frozen')} ({_by_flops(row, frozen)})" if row else "" for row in found]
        peaks = [_short(row, "extra_peak_mib") if row else "" for row in found]
        table.append([f"{int(point):,}", _short(frozen, "median_ms"), *times, *peaks])
    return table


def crossover(rows: list[Row]) -> Table:
    """Tokens above which building dW is cheaper, and the total number of tokens after which merging is."""
    table = [["cheaper than the operator", "measured T", "by counted FLOPs", "by the formula"]]
    for one in crossovers(rows):
        measured = {0.0: f"all from {one.lowest:,.0f}", math.inf: f"none to {one.highest:,.0f}"}.get(one.measured)
        name = f"{one.dense.removeprefix('tcur ')}, {one.mode}"
        table.append([name, measured or _tokens(one.measured), _tokens(one.counted), _tokens(one.formula)])
    if any((row["sweep"], row["mode"]) == ("tokens", "inference") for row in rows):
        found = merge(rows)
        table.append(["merged once, inference: tokens in all", _tokens(found.measured), "", _tokens(found.formula)])
    return table


def host(rows: list[Row]) -> Table:
    """One row per variant: the host's time for a call in us."""
    return [["", "median, µs", "least, µs"], *([row[name] for name in HOST] for row in rows)]


def profile(rows: list[Row]) -> Table:
    """One row per stage of a profile, with the file's numbers."""
    return [list(STAGES), *([f"`{row['stage']}`", *(row[name] for name in STAGES[1:])] for row in rows)]


def scaling(rows: list[Row]) -> Table:
    """One row per model and method: what each process holds with DDP and with FSDP, in GB."""
    table = [
        ["GB per process", "trained parameters", "base, DDP", "base, FSDP", "gathered, FSDP", "C and R", "core state",
         "saved for backward"]
    ]  # fmt: skip
    for (model, method), (ddp, fsdp) in _layouts(rows).items():
        bytes_ = [ddp["base"], fsdp["base"], fsdp["gathered"], fsdp["factors"], ddp["trained"], fsdp["saved"]]
        table.append([f"{model}: {method}", f"{int(fsdp['numbers']):,}", *map(_gigabytes, bytes_)])
    return table


def scaling_step(rows: list[Row]) -> Table:
    """One row per model and method: per process and step FLOPs, bytes received, and seconds by the file's rates."""
    table = [
        ["per process and step", "FLOPs over the base's", "weights, FSDP, GB", "gradients, GB", "computing, s",
         "transfers, DDP, s", "transfers, FSDP, s"]
    ]  # fmt: skip
    for (model, method), (ddp, fsdp) in _layouts(rows).items():
        seconds = [_short(row, name) for row, name in ((fsdp, "compute_s"), (ddp, "transfer_s"), (fsdp, "transfer_s"))]
        sent = [_gigabytes(fsdp["weights"]), _gigabytes(ddp["gradients"])]
        table.append([f"{model}: {method}", f"{number(fsdp, 'flops_over_base'):.3f}", *sent, *seconds])
    return table


def _layouts(rows: list[Row]) -> dict[tuple[str, str], tuple[Row, Row]]:
    """(model, method) -> its rows for DDP and for FSDP."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["method"]), {})[row["layout"]] = row
    return {key: (layouts["ddp"], layouts["fsdp"]) for key, layouts in found.items()}


def _gigabytes(text: str) -> str:
    found = float(text) / 1e9
    return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def _times(row: Row, column: str) -> str:
    found = value(row, column)
    return "" if found is None else f"{found:.2f}"


def _by_flops(row: Row, frozen: Row) -> str:
    return f"{number(row, 'gflop') / number(frozen, 'gflop'):.2f}"


def _share(row: Row) -> str:
    found = value(row, "share_of_limit")
    return "" if found is None else f"{100 * found:.0f} %"


def _short(row: Row, column: str) -> str:
    """Three significant digits, or a whole number from 100 on."""
    found = value(row, column)
    if found is None:
        return ""
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.3g}"


def _tokens(count: float) -> str:
    return {0.0: "always", math.inf: "never"}.get(count) or f"{count:,.0f}"


# Name -> the function that makes the table, and the columns that its file needs (None: those of a file of cases).
TABLES: dict[str, tuple[Callable[[list[Row]], Table], tuple[str, ...] | None]] = {
    "layers": (layers, None),
    "over_frozen": (lambda rows: by_variant(rows, lambda row: _times(row, "over_frozen")), None),
    "over_lora": (lambda rows: by_variant(rows, lambda row: _times(row, "over_lora")), None),
    "over_peft_r32": (lambda rows: by_variant(rows, lambda row: _times(row, "over_peft_r32")), None),
    "share_of_limit": (lambda rows: by_variant(rows, _share), None),
    "memory": (memory, None),
    "growth-tokens": (lambda rows: growth("tokens", "training", rows), None),
    "growth-tokens-inference": (lambda rows: growth("tokens", "inference", rows), None),
    "growth-rank": (lambda rows: growth("rank", "training", rows), None),
    "growth-slices": (lambda rows: growth("slices", "training", rows), None),
    "growth-width": (lambda rows: growth("width", "training", rows), None),
    "crossover": (crossover, None),
    "backends": (backends, None),
    "summary": (summary, None),
    "profile": (profile, STAGES),
    "host": (host, HOST),
    "scaling": (scaling, SCALING),
    "scaling-step": (scaling_step, SCALING),
    "methods": (methods_table, METHODS),
    "language": (language_table, LANGUAGE_COLUMNS),
    "ablations": (ablations_table, ABLATIONS),
    "comparison": (comparison_table, COMPARISON),
}


def outdated(pages: Sequence[Path], root: Path) -> dict[Path, str]:
    """Pages whose tables differ from their files -> the page's text with the right tables.

    Raises ValueError that names the page, where :func:`fill` raises an error.
    """
    found = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        try:
            right = fill(text, root)
        except (ValueError, OSError) as error:
            raise ValueError(f"{page}: {error}") from error
        if right != text:
            found[page] = right
    return found


def tables(
    pages: Annotated[list[Path], typer.Argument(metavar="PAGE...", help="Markdown files, e.g. README.md docs/*.md.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing, only say what is out of date.")] = False,
) -> None:
    """Write the tables of the docs from result files; with --check exit code 1 says that some are out of date."""
    stale = outdated(pages, Path.cwd())
    for page, text in stale.items():
        if not check:
            write_bytes(page, text.encode())
        typer.echo(f"{page}: {'out of date' if check else 'written'}")
    if stale and check:
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 1 where pages are out of date, 2 for wrong input."""
    return run_command(tables, arguments, COMMAND)


if __name__ == "__main__":
    sys.exit(main())
