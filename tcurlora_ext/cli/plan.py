"""``tcurlora plan``: what an adapter costs on a model, counted from shapes alone."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import rich_table, terminal, text_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TOKENS = 2048
LEARNED_NOTES = (
    "The warm-up of learned factors holds this beside the model and its activations: gradients of the whole weights, "
    "the optimizer's moments (Adam: two for each weight; factored: one for each row and column), copies of the weights."
)
KEYS = ("stack", "method", "form", "layout")  # columns that say what a line is about
BRIEF_NOTES = (
    "GFLOP: of one forward and backward pass, the frozen layers included.\n"
    "saved: for the backward pass, beside what the frozen layers keep.\n"
    "--wide shows all counts, --json and --csv write them."
)
NOTES = (
    "T > dW: from this number of tokens T on, a materialised dW takes fewer forward FLOPs. The rows of tcur and lora "
    "count what the adapter adds to one forward and backward pass; those of base count the frozen layers."
)
RANK_NOTES = (
    "base: frozen weights at rest; gathered: the most that is gathered beside them. trained: the trained parameters, "
    "their gradients and Adam's two means. weights, gradients: received in a step. Seconds are these counts divided by "
    "the given rates, not a measurement."
)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="unetr, swinunetr, vit, dynunet, segresnet, a transformers config.json or its folder, or "
            "module:callable."
        ),
    ],
    kwargs: options.Kwargs = None,
    preset: Annotated[
        str,
        typer.Option(
            help="paper: coupled stacks; light: a core for each layer, which rides on the base product; learned: a "
            "core for each layer over learned factors."
        ),
    ] = "paper",
    rank: Annotated[
        Any,
        typer.Option(
            parser=options.rank,
            metavar="R",
            help="Tubal rank: r, or c,r for c columns and r rows. Default: the preset's, 8 or 32.",
        ),
    ] = None,
    rank_pattern: Annotated[
        list[Any] | None,
        typer.Option(
            parser=options.named_rank,
            metavar="NAME=R",
            help="NAME=R or NAME=C,R: another rank for the modules whose name is NAME, ends in it or matches it as a "
            "regular expression; may be repeated.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Modules to adapt, by name or end of the name; may be repeated.")
    ] = None,
    target_regex: Annotated[
        str | None,
        typer.Option(parser=options.regex, metavar="REGEX", help="Modules to adapt, by a match of the whole name."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Modules to leave out, by name or end of the name; may be repeated.")
    ] = None,
    split: Annotated[
        list[Any] | None,
        typer.Option(
            parser=options.named_split,
            metavar="NAME=N",
            help="Fused modules of which the N equal parts are slices of their own. Default: the preset's, those known "
            "by name whose parts have one shape, or none.",
        ),
    ] = None,
    stack_by: Annotated[
        str | None,
        typer.Option(help="Which modules share a stack: shape, role or none. Default: the preset's, shape or none."),
    ] = None,
    stack_blocks: Annotated[
        int | None, typer.Option(help="Cut the stacks into runs of this many consecutive blocks.")
    ] = None,
    frequencies: Annotated[
        int | None, typer.Option(help="How many frequencies the cores hold, the lowest ones. Default: all.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout probability on the adapter's input.")] = 0.0,
    transform: Annotated[
        str | None, typer.Option(help="dft, dct or identity. Default: the preset's, dft or identity.")
    ] = None,
    trainable: Annotated[str, typer.Option(help="What trains: core, or all for C, U and R.")] = "core",
    core_domain: Annotated[str, typer.Option(help="What the core's parameters are: fourier or slice.")] = "fourier",
    factors: Annotated[
        str | None,
        typer.Option(help="weights, learned or learned_rows. Default: the preset's, weights or learned."),
    ] = None,
    orthonormal: Annotated[bool, typer.Option("--orthonormal", help="Orthonormal columns and rows.")] = False,
    bits: Annotated[int, typer.Option(help="Bits of an entry of learned directions.")] = 2,
    parts: Annotated[int, typer.Option(help="In how many parts the warm-up of learned factors may be.")] = 4,
    tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens that every layer reads. Default: those of a preset's window, else {TOKENS}."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows per step, for a preset without --tokens.")] = 1,
    dtype: Annotated[
        Any,
        typer.Option(
            parser=options.dtype,
            metavar="DTYPE",
            help="Of weights and activations: float32, bfloat16 or float16. Default: the model's.",
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA that tCUR is compared with.")] = 8,
    ranks: Annotated[
        int | None,
        typer.Option(help="Also count what each of this many processes holds and receives, by DDP and FSDP."),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="FLOPs per second of one process, for an estimate of a step's time.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes per second that one process receives, for the same estimate.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="JSON file to write all counts to; - writes them to stdout in place of the table."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write all counts to.")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Show all counts, in more than 80 columns.")] = False,
) -> None:
    """Count what tCUR costs on a model beside LoRA, per stack and in all, without reading any weights.

    Counted are trained parameters, FLOPs, bytes kept for backward and bytes of the adapter file. A tree shows which
    layers are adapted, and why the others are not.
    """
    from tcurlora_ext.adapter.config import TCURConfig
    from tcurlora_ext.analysis.plan import plan as count
    from tcurlora_ext.analysis.plan import trace_calls
    from tcurlora_ext.analysis.processes import Rates, rank_costs, rank_rows, rank_table, rank_text
    from tcurlora_ext.cli.coverage_tree import coverage_tree
    from tcurlora_ext.cli.model_source import build_model, preset_input
    from tcurlora_ext.io.records import write_csv, write_json

    if target and target_regex is not None:
        raise ValueError("found both --target and --target-regex, expected one of them")
    if ranks is None and (flops, bandwidth) != (None, None):
        raise ValueError("found --flops or --bandwidth without --ranks, expected the number of processes, too")
    rates = Rates(flops, bandwidth)
    arguments = kwargs or {}
    if batch < 1:
        raise ValueError(f"batch: found {batch}, expected a positive whole number")
    chosen: dict[str, Any] = {
        "rank": rank, "stack_by": stack_by, "transform": transform, "split_fused": dict(split) if split else None,
        "factors": factors,
    }  # fmt: skip
    config = TCURConfig.preset(
        preset, target_modules=target_regex or target or None, exclude_modules=exclude or None,
        rank_pattern=dict(rank_pattern or ()), stack_blocks=stack_blocks, frequencies=frequencies,
        dropout=dropout, trainable=trainable, core_domain=core_domain, orthonormal=orthonormal,
        **{name: value for name, value in chosen.items() if value is not None},
    )  # fmt: skip
    built = build_model(model, arguments)
    example = None if tokens is not None else preset_input(model, arguments, batch)
    if example is not None:
        found = count(built, config, trace_calls(built, config, example), lora_rank, dtype, bits, parts)
        rows = f"{batch} window(s) of {'x'.join(map(str, example.shape[2:]))} voxels"
    else:
        number = TOKENS if tokens is None else tokens
        found = count(built, config, number, lora_rank, dtype, bits, parts)
        rows = f"{number} tokens a layer"
    shown_rank = ",".join(map(str, config.rank)) if isinstance(config.rank, tuple) else config.rank
    heading = f"{model}: {rows}\n{found.dtype}, tCUR of rank {shown_rank} beside LoRA of rank {lora_rank}"
    content: dict[str, Any] = {"model": model, "tokens": rows, "dtype": found.dtype, "lora_rank": lora_rank,
               "config": config.to_json(), "rows": found.rows(), "coverage": found.covers.to_json()}  # fmt: skip
    if found.learned is not None:
        content["learned"] = found.learned.to_json()
    costs = None if ranks is None else rank_costs(built, found, ranks, rates, dtype)
    if costs is not None:
        content |= {"rates": {"flops": flops, "bandwidth": bandwidth}, "ranks": rank_rows(costs)}
    if csv is not None:
        write_csv(csv, found.rows())
    if json == Path("-"):
        typer.echo(json_format.dumps(content, indent=2))
        return
    if json is not None:
        write_json(json, content)
    table, notes = (found.table(), NOTES) if wide else (found.brief(), BRIEF_NOTES)
    _show(table, text_table(table[0], table[1:], left=_left(table[0])), heading, notes)
    terminal().print("\n", coverage_tree(found.covers), sep="")
    if found.learned is not None:
        typer.echo(f"\n{found.learned}\n\n{LEARNED_NOTES}")
    if costs is not None:
        _show(
            rank_table(costs),
            rank_text(costs),
            f"\nOn {ranks} processes: memory and traffic of each in one step",
            RANK_NOTES,
        )


def _show(table: list[list[str]], text: str, heading: str, notes: str) -> None:
    """A table on a terminal, in parts where it is too wide; text in a file or pipe."""
    console = terminal()
    if not console.is_terminal:
        typer.echo(f"{heading}\n\n{text}\n\n{notes}")
        return
    console.print(heading, style="italic", markup=False, highlight=False)
    for columns in _parts(table, console):
        console.print(_part(table, columns))
    console.print(notes, style="dim", markup=False, highlight=False)


def _part(table: list[list[str]], columns: list[int]) -> Table:
    """Some columns of a table whose first line is its header; an empty line after each stack."""
    from rich.box import SIMPLE_HEAD

    header, *lines = [[line[index] for index in columns] for line in table]
    part = rich_table(header, lines, _left(header), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in part.rows[2::3] if "stack" in header else ():
        row.end_section = True
    return part


def _left(header: list[str]) -> list[int]:
    return [index for index, name in enumerate(header) if name in KEYS]


def _parts(table: list[list[str]], console: Console) -> list[list[int]]:
    """Columns of as few tables as fit the terminal without a line break in a cell; each has the columns of KEYS."""
    unbroken = console.options.update(width=10_000)
    keys = [index for index, name in enumerate(table[0]) if name in KEYS]
    parts: list[list[int]] = []
    for index in range(len(table[0])):
        if index in keys:
            continue
        wider = sorted({*keys, *parts[-1], index}) if parts else []
        if parts and console.measure(_part(table, wider), options=unbroken).maximum <= console.width:
            parts[-1] = wider
        else:
            parts.append(sorted([*keys, index]))
    return parts
