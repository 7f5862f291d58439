"""``tcurlora bench``: what the adapter costs on this device, beside LoRA, dense variants and the device's limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli.options import Words, words

if TYPE_CHECKING:
    from tcurlora_ext.bench.cases import Case

COLUMNS = {
    "variant": "variant", "median_ms": "ms", "p20_ms": "p20", "p80_ms": "p80", "over_frozen": "x frozen",
    "over_lora": "x LoRA", "over_peft_r32": "x PEFT r=32", "share_of_limit": "of limit", "extra_peak_mib": "extra MiB",
    "saved_mib": "saved MiB", "trained": "trained parameters", "launches": "launches",
}  # fmt: skip


def bench(
    full: Annotated[bool, typer.Option("--full", help="All cases, in two dtypes: hours on a CPU.")] = False,
    growth: Annotated[
        bool, typer.Option("--growth", help="Cases that vary the tokens, the rank, the slices or the width.")
    ] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Cases for a GPU, in bfloat16: eight minutes.")] = False,
    riding: Annotated[
        bool, typer.Option("--riding", help="Adapters with a core for each layer, beside the paper's stacks and LoRA.")
    ] = False,
    cases: Annotated[
        Words | None,
        typer.Option(parser=words, metavar="WORDS", help="Only cases whose name contains one of these, a,b,c."),
    ] = None,
    variants: Annotated[
        Words | None,
        typer.Option(parser=words, metavar="WORDS", help="Likewise for variants; frozen and lora always run."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Rounds in which the variants take turns, at least 2.")] = 9,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; those of this device go into a subfolder named after it.")
    ] = Path("bench/results"),
    list_cases: Annotated[
        bool, typer.Option("--list", help="Show the cases and variants, and measure nothing.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two result files to compare: what differs by more than noise.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --compare: also show what differs by noise.")] = False,
) -> None:
    """Measure what the adapter costs on this device and write CSV files; the default set takes under five minutes.

    The outputs and gradients of every variant are checked first, and one whose results differ is not timed. Where a
    variant fails, its row says so, the others are measured, and the exit code is 1.
    """
    from tcurlora_ext.bench.devices import choose_device

    if compare is not None:
        _compare(*compare, everything)
        return
    asked = [name for name, given in {"full": full, "growth": growth, "gpu": gpu, "riding": riding}.items() if given]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in asked)} are sets of cases, expected one of them")
    if rounds < 2:
        raise ValueError(f"--rounds is {rounds}, expected at least 2")
    name = asked[0] if asked else "quick"
    wanted = _cases(name, cases)
    target = choose_device(device)
    chosen = _variants(variants, target)
    if list_cases:
        _list(name, wanted, chosen, target)
        return
    _measure(name, wanted if cases else None, chosen, target, rounds, output)


def _cases(name: str, parts: tuple[str, ...] | None) -> list[Case]:
    from tcurlora_ext.bench.cases import SETS
    from tcurlora_ext.bench.results import selected

    return SETS[name]() if parts is None else selected(SETS[name](), parts)


def _variants(parts: tuple[str, ...] | None, device: Any) -> list[str]:
    """Names of the variants that run."""
    from tcurlora_ext.bench.variants import variants

    known = [variant.name for variant in variants(device)]
    found = [name for name in known if parts is None or any(part in name for part in parts)]
    if not found:
        raise ValueError(f"--variants: found none with {', '.join(parts or ())}, expected part of {', '.join(known)}")
    return found


def _list(name: str, cases: list[Case], variants: list[str], device: Any) -> None:
    typer.echo(f"set {name}, {len(cases)} cases")
    for case in cases:
        typer.echo(f"  {case.id}" + (f", sweep of {case.sweep}" if case.sweep else ""))
    typer.echo(f"variants on {device}: {', '.join(variants)}")


def _measure(
    name: str, cases: list[Case] | None, variants: list[str], device: Any, rounds: int, output: Path
) -> None:  # fmt: skip
    from tcurlora_ext.bench.results import write_host, write_set
    from tcurlora_ext.bench.rows import FAILURE, title
    from tcurlora_ext.io.table import text_table

    failed: list[str] = []

    def show(rows: list[dict[str, Any]]) -> None:
        first = rows[0]
        failed.extend(f"{title(row)}, {row['variant']}: {row[FAILURE]}" for row in rows if row[FAILURE])
        typer.echo(f"{first['case']}, r={first['rank']}, T={first['tokens']}, {first['mode']}, {first['dtype']}")
        typer.echo(text_table(list(COLUMNS.values()), [[str(row[key]) for key in COLUMNS] for row in rows]) + "\n")

    path = write_set(
        name,
        device,
        output,
        cases,
        rounds,
        keep=lambda variant, case: variant.name in variants,
        log=typer.echo,
        show=show,
    )
    if cases is None and name not in ("growth", "riding"):
        host = write_host(device, output, rounds)
        typer.echo("the host's time for a forward call, in microseconds")
        typer.echo(
            text_table(["variant", "median", "least"], [[r["variant"], r["median_us"], r["least_us"]] for r in host])
        )
    typer.echo(f"written to {path.parent}")
    if failed:
        typer.echo("\n".join(["failed:", *failed]))
        raise typer.Exit(1)


def _compare(a: Path, b: Path, everything: bool) -> None:
    from tcurlora_ext.bench.reading.compare import compare

    typer.echo(compare(a, b).text(everything))
