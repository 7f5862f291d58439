"""Tables of the docs, written by this module from result files: no number in them is without its file.

In a page, between two comments that a reader does not see,

    <!-- table: NAME FILE -->
    <!-- end -->

stands the table NAME of FILE, a path from the repository's root, and a line that says where it is from.

    python -m tcurlora_ext.bench.reading.tables [--check] README.md docs/*.md
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tcurlora_ext.io.atomic import write_bytes

from ..rows import PROVENANCE, Row, by_case, labels, number, read_results, read_rows, tcur_backend, value
from ..run import PAPER
from ..variants import FLOOR, LORA
from .crossover import DENSE, STACK, TRANSIENT, crossovers, merge

COMMAND = "python -m tcurlora_ext.bench.reading.tables"
MEASURE = "tcurlora bench"  # writes the files
COUNT = "python -m tcurlora_ext.bench.scaling"  # writes those of tables in COUNTED
COUNTED = ("scaling", "scaling-step")
MARKED = re.compile(r"^<!-- table: (.*?) -->\n(.*?)^<!-- end -->$", re.M | re.S)
OPENED = re.compile(r"^\s*<!-- (?:table:|end)", re.M)
SAID = {"rounds": "{} rounds", "torch": "torch {}", "commit": "commit {}"}
PROFILE = "python -m tcurlora_ext.bench.profile"
STAGES = ("stage", "launches", "time_ms", "least_ms", "gflop", "fewest_mib")
HOST = ("variant", "median_us", "least_us")
SCALING = (
    "model", "method", "layout", "numbers", "base", "gathered", "factors", "trained", "saved", "weights", "gradients",
    "flops_over_base", "compute_s", "transfer_s",
)  # fmt: skip

Table = list[list[str]]  # the header, then rows


def fill(text: str, root: Path) -> str:
    """A page with its tables made anew from the files under ``root``.

    Raises ValueError for a marker without its other half or a table of no known name, OSError or ValueError for its
    file.
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
    return f"<!-- table: {name} {file} -->\n\n{markdown(make(rows))}\n\n{_source(name, file, rows)}\n\n<!-- end -->"


def _source(name: str, file: str, rows: list[Row]) -> str:
    """Where a table is from: its file, what the cases share, device, rounds, versions, commit."""
    if name in COUNTED:
        return f"`{file}`, counted by `{COUNT}`."
    shared = labels(rows)[1] if "case" in rows[0] else ""
    stem = Path(file).stem
    command = PROFILE if stem.startswith("profile") else MEASURE
    option = f" --{stem}" if stem in ("growth", "full", "gpu") else ""
    about = {name: ", ".join(dict.fromkeys(row.get(name, "") for row in rows)) for name in (*PROVENANCE, "rounds")}
    said = [shared, about["device"]]
    said += [text.format(about[name]) for name, text in SAID.items() if about[name]]
    return "; ".join([f"`{file}`, measured by `{command}{option}`", *filter(None, said)]) + "."


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, the first column to the left and the others to the right."""
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layers(rows: list[Row]) -> Table:
    """A row a case: the operator beside the floor, LoRA of rank q and PEFT's of rank 32."""
    backend = tcur_backend(rows)
    header = [
        "", "q", "frozen, ms", "LoRA of rank q / frozen", "PEFT LoRA r=32 / frozen", f"{backend} / frozen",
        "20th to 80th percentile", f"{backend} / LoRA of rank q", f"{backend} / PEFT LoRA r=32", "share of limit",
    ]  # fmt: skip
    names, _ = labels(rows)
    table = [header]
    for at, forms in by_case(rows).items():
        ours = forms.get(backend)
        if ours is None:
            continue
        spread = f"{_times(ours, 'over_frozen_p20')} to {_times(ours, 'over_frozen_p80')}"
        over = [_times(forms[name], "over_frozen") if name in forms else "" for name in (LORA, PAPER)]
        table.append([
            names[at], ours["q"], _short(forms[FLOOR], "median_ms"), *over, _times(ours, "over_frozen"), spread,
            _times(ours, "over_lora"), _times(ours, "over_peft_r32"), _share(ours),
        ])  # fmt: skip
    return table


def forms_by_case(rows: list[Row], cell: Callable[[Row], str]) -> Table:
    """A row a variant and a column a case."""
    cases = by_case(rows)
    names, _ = labels(rows)
    table = [["", *(names[at] for at in cases)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        table += [[variant, *(cell(forms[variant]) if variant in forms else "" for forms in cases.values())]]
    return table


def memory(rows: list[Row]) -> Table:
    """A row a network and variant; layers alone are left out."""
    table = [["", "variant", "extra peak, MiB", "saved for backward, MiB", "adapter, MiB", "trained", "launches"]]
    names, _ = labels(rows)
    for at, forms in by_case([row for row in rows if row["network"] not in ("layer", "stack")]).items():
        for place, row in enumerate(forms.values()):
            amounts = [_short(row, column) for column in ("extra_peak_mib", "saved_mib", "adapter_mib")]
            counts = [f"{int(number(row, column)):,}" for column in ("trained", "launches")]
            table.append([names[at] if place == 0 else "", row["variant"], *amounts, *counts])
    return table


def backends(rows: list[Row]) -> Table:
    """A row a layer that trains: milliseconds by the operator's backends, and what the fastest adds to the floor."""
    found = by_case([row for row in rows if (row["network"], row["mode"]) == ("layer", "training")])
    names, _ = labels([row for forms in found.values() for row in forms.values()])
    best = tcur_backend(rows)
    ran = [name for name in ("tcur eager", "tcur native", "tcur triton") if any(name in f for f in found.values())]
    table = [["", "frozen, ms", "LoRA of rank q", *ran, f"extra of {best} / extra of LoRA"]]
    for at, forms in found.items():
        if best in forms:
            times = [_short(forms[name], "median_ms") if name in forms else "" for name in (FLOOR, LORA, *ran)]
            table.append([names[at], *times, _times(forms[best], "extra_over_lora")])
    return table


def summary(rows: list[Row]) -> Table:
    """A row a network and form: the paper's LoRA, the operator and the dense forms of tCUR."""
    best = tcur_backend(rows)
    wanted = {
        PAPER: "LoRA r=32 (PEFT)",
        best: "tCUR r=8",
        DENSE: "the same, ΔW built",
        STACK: "the same, whole stack built",
    }
    table = [["", "trained", "time / frozen", "extra peak memory, MiB", "kept for backward, MiB more"]]
    for forms in by_case([row for row in rows if row["network"] not in ("layer", "stack")]).values():
        kept = number(forms[FLOOR], "saved_mib")
        for variant, name in wanted.items():
            if variant in forms:
                row = forms[variant]
                more = f"{number(row, 'saved_mib') - kept:,.0f}"
                trained = f"{int(number(row, 'trained')):,}"
                cells = [trained, _times(row, "over_frozen"), _short(row, "extra_peak_mib"), more]
                table.append([f"{row['case']}: {name}", *cells])
    return table


def growth(sweep: str, mode: str, rows: list[Row]) -> Table:
    """A row a point of a sweep: the floor's time, times over it (and FLOPs over its FLOPs), extra peaks."""
    backend = tcur_backend([row for row in rows if row["sweep"]])
    names = [LORA, backend, DENSE, TRANSIENT] if mode == "training" else [LORA, backend, DENSE]
    symbol = {"tokens": "T", "rank": "r", "slices": "S", "width": "width"}[sweep]
    table = [[symbol, "frozen, ms", *names, *(f"MiB: {name}" for name in names)]]
    for forms in by_case([row for row in rows if (row["sweep"], row["mode"]) == (sweep, mode)]).values():
        found = [forms.get(name) for name in names]
        floor = forms[FLOOR]
        point = floor[{"slices": "stack", "width": "in"}.get(sweep, sweep)]
        times = [f"{_times(row, 'over_frozen')} ({_by_flops(row, floor)})" if row else "" for row in found]
        peaks = [_short(row, "extra_peak_mib") if row else "" for row in found]
        table.append([f"{int(point):,}", _short(floor, "median_ms"), *times, *peaks])
    return table


def crossover(rows: list[Row]) -> Table:
    """Tokens above which a dense form is cheaper, and after which a merged dW has paid."""
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
    """Microseconds until the host has asked for a call."""
    return [["", "median, µs", "least, µs"], *([row[name] for name in HOST] for row in rows)]


def profile(rows: list[Row]) -> Table:
    """A row a stage, as the file has it."""
    return [list(STAGES), *([f"`{row['stage']}`", *(row[name] for name in STAGES[1:])] for row in rows)]


def scaling(rows: list[Row]) -> Table:
    """A row a model and method in GB: what a rank holds by DDP and by FSDP."""
    header = ["GB a rank", "trained", "base, DDP", "base, FSDP", "gathered, FSDP", "C and R", "core state", "kept"]
    table = [header]
    for (model, method), (ddp, fsdp) in _layouts(rows).items():
        bytes_ = [ddp["base"], fsdp["base"], fsdp["gathered"], fsdp["factors"], ddp["trained"], fsdp["saved"]]
        table.append([f"{model}: {method}", f"{int(fsdp['numbers']):,}", *map(_gigabytes, bytes_)])
    return table


def scaling_step(rows: list[Row]) -> Table:
    """A row a model and method: what a step computes and brings to a rank, and seconds by the file's rates."""
    table = [
        ["a step of a rank", "FLOPs over the base's", "weights, FSDP, GB", "gradients, GB", "computing, s",
         "transfers, DDP, s", "transfers, FSDP, s"]
    ]  # fmt: skip
    for (model, method), (ddp, fsdp) in _layouts(rows).items():
        seconds = [_short(row, name) for row, name in ((fsdp, "compute_s"), (ddp, "transfer_s"), (fsdp, "transfer_s"))]
        sent = [_gigabytes(fsdp["weights"]), _gigabytes(ddp["gradients"])]
        table.append([f"{model}: {method}", f"{number(fsdp, 'flops_over_base'):.3f}", *sent, *seconds])
    return table


def _layouts(rows: list[Row]) -> dict[tuple[str, str], tuple[Row, Row]]:
    """(model, method) -> its rows by DDP and by FSDP."""
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


def _by_flops(row: Row, floor: Row) -> str:
    return f"{number(row, 'gflop') / number(floor, 'gflop'):.2f}"


def _share(row: Row) -> str:
    found = value(row, "share_of_limit")
    return "" if found is None else f"{100 * found:.0f} %"


def _short(row: Row, column: str) -> str:
    """Three digits."""
    found = value(row, column)
    if found is None:
        return ""
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.3g}"


def _tokens(count: float) -> str:
    return {0.0: "always", math.inf: "never"}.get(count) or f"{count:,.0f}"


# Name -> what makes the table, and the columns of its file (None: a file of cases).
TABLES: dict[str, tuple[Callable[[list[Row]], Table], tuple[str, ...] | None]] = {
    "layers": (layers, None),
    "over_frozen": (lambda rows: forms_by_case(rows, lambda row: _times(row, "over_frozen")), None),
    "over_lora": (lambda rows: forms_by_case(rows, lambda row: _times(row, "over_lora")), None),
    "over_peft_r32": (lambda rows: forms_by_case(rows, lambda row: _times(row, "over_peft_r32")), None),
    "share_of_limit": (lambda rows: forms_by_case(rows, _share), None),
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
}


def outdated(pages: Sequence[Path], root: Path) -> dict[Path, str]:
    """Pages whose text is not what their files give -> the text that it should be. Errors name the page."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes pages, or says which are out of date: exit code 1, and 2 for an error."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes the tables of the docs from result files.")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="write nothing, only say what is out of date")
    given = parser.parse_args(arguments)
    try:
        stale = outdated(given.pages, Path.cwd())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for page, text in stale.items():
        if not given.check:
            write_bytes(page, text.encode())
        print(f"{page}: {'out of date' if given.check else 'written'}")
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
