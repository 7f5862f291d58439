"""``tcurlora plan``: what an adapter costs on a model, from shapes alone."""

from __future__ import annotations

import json as json_format
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli.options import mapping

if TYPE_CHECKING:
    from torch import dtype as Dtype

TOKENS = 2048
NOTES = (
    "T > dW: above so many tokens a materialised dW takes fewer forward FLOPs. FLOPs and bytes are the adapter's own, "
    "for one forward and backward pass; those of base are the frozen layers'."
)
RANK_NOTES = (
    "base, gathered: frozen weights at rest, and at most gathered beside. trained: numbers, gradients, Adam's means. "
    "weights, gradients: received in a step. Seconds are these counts over the given rates, not a measurement."
)


def plan(
    model: Annotated[
        str,
        typer.Argument(help="unetr, swinunetr, vit, a transformers config.json or its folder, or module:callable."),
    ],
    kwargs: Annotated[str, typer.Option(help="JSON object: sizes of a preset, or arguments of the callable.")] = "{}",
    rank: Annotated[str, typer.Option(help="Tubal rank r, or c,r.")] = "8",
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option(help="NAME=R or NAME=C,R: another rank for modules of this name, end of a name or regex."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Name, or end of a name, of modules to adapt; may be given again.")
    ] = None,
    target_regex: Annotated[str | None, typer.Option(help="Regex for the whole name, in place of --target.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Names, or ends of names, to leave as they are.")] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="NAME=N: rows of a fused projection are N slices. Default: qkv=3, c_attn=3."),
    ] = None,
    stack_by: Annotated[str, typer.Option(help="shape, role or none.")] = "shape",
    stack_blocks: Annotated[
        int | None, typer.Option(help="Cut stacks by shape or role into runs of so many consecutive blocks.")
    ] = None,
    frequencies: Annotated[
        int | None, typer.Option(help="Only the lowest frequencies in the cores. Default: all.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="On the adapter's input.")] = 0.0,
    transform: Annotated[str, typer.Option(help="dft, dct or identity.")] = "dft",
    trainable: Annotated[str, typer.Option(help="core or all.")] = "core",
    core_domain: Annotated[str, typer.Option(help="fourier or slice.")] = "fourier",
    tokens: Annotated[
        int | None,
        typer.Option(help=f"Rows of every layer's input. Default: those of a preset's window, else {TOKENS}."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows a step, for a preset without --tokens.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and activations: float32, bfloat16 or float16. Default: the model's.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA beside it.")] = 8,
    ranks: Annotated[
        int | None, typer.Option(help="Also what each of so many processes holds and receives, by DDP and FSDP.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="FLOPs a second of one process, for an estimate of a step's time by count.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes a second that reach one process, for the same estimate.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this JSON file; - for stdout alone.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all numbers to this CSV file.")] = None,
) -> None:
    """Trained numbers, q, FLOPs, bytes kept for backward and bytes of the file: tCUR beside LoRA, by stack."""
    from tcurlora_ext.adapter.config import TCURConfig
    from tcurlora_ext.analysis.plan import plan as count
    from tcurlora_ext.analysis.plan import trace_calls
    from tcurlora_ext.analysis.processes import Rates, rank_costs, rank_rows, rank_table, rank_text
    from tcurlora_ext.cli.model_source import build_model, preset_input
    from tcurlora_ext.io.records import write_csv, write_json

    if target and target_regex is not None:
        raise ValueError("found both --target and --target-regex, expected one of them")
    if target_regex is not None:
        _check_regex(target_regex)
    if ranks is None and (flops, bandwidth) != (None, None):
        raise ValueError("found --flops or --bandwidth without --ranks, expected the number of processes, too")
    rates = Rates(flops, bandwidth)
    arguments = mapping("kwargs", kwargs)
    if batch < 1:
        raise ValueError(f"batch: found {batch}, expected a positive whole number")
    splits: dict[str, Any] = {"split_fused": dict(_split(text) for text in split)} if split else {}
    config = TCURConfig(
        rank=parse_rank(rank), target_modules=target_regex or target or None, exclude_modules=exclude or None,
        rank_pattern=dict(_ranked(text) for text in rank_pattern or ()), stack_by=stack_by,
        stack_blocks=stack_blocks, frequencies=frequencies, dropout=dropout, transform=transform, trainable=trainable,
        core_domain=core_domain, **splits,
    )  # fmt: skip
    precision = parse_dtype(dtype)
    built = build_model(model, arguments)
    example = None if tokens is not None else preset_input(model, arguments, batch)
    if example is not None:
        found = count(built, config, trace_calls(built, config, example), lora_rank, precision)
        rows = f"{batch} window(s) of {'x'.join(map(str, example.shape[2:]))} voxels"
    else:
        number = TOKENS if tokens is None else tokens
        found = count(built, config, number, lora_rank, precision)
        rows = f"{number} tokens a layer"
    heading = f"{model}: {rows}, {found.dtype}, tCUR of rank {rank} beside LoRA of rank {lora_rank}"
    content: dict[str, Any] = {"model": model, "tokens": rows, "dtype": found.dtype, "lora_rank": lora_rank,
               "config": config.to_json(), "rows": found.rows()}  # fmt: skip
    costs = None if ranks is None else rank_costs(built, found, ranks, rates, precision)
    if costs is not None:
        content |= {"rates": {"flops": flops, "bandwidth": bandwidth}, "ranks": rank_rows(costs)}
    if csv is not None:
        write_csv(csv, found.rows())
    if json == Path("-"):
        typer.echo(json_format.dumps(content, indent=2))
        return
    if json is not None:
        write_json(json, content)
    _show(found.table(), str(found), heading, NOTES)
    if costs is not None:
        _show(rank_table(costs), rank_text(costs), f"\nOn {ranks} processes, bytes of each in a step", RANK_NOTES)


def parse_rank(text: str) -> int | tuple[int, int]:
    """ "8", or "4,8" for c columns and r rows."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        return values[0]
    if len(values) == 2:
        return values[0], values[1]
    raise ValueError(f"rank: found '{text}', expected a positive whole number r, or c,r")


def parse_dtype(text: str | None) -> Dtype | None:
    """A floating dtype by name."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text is None:
        return None
    if text not in known:
        raise ValueError(f"dtype: found '{text}', expected one of {', '.join(known)}")
    return known[text]


def _check_regex(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"target-regex: found '{text}', expected a regular expression ({error})") from None


def _split(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdigit():
        raise ValueError(f"split: found '{text}', expected NAME=N such as qkv=3")
    return name, int(count)


def _ranked(text: str) -> tuple[str, int | tuple[int, int]]:
    name, _, rank = text.rpartition("=")
    if not name:
        raise ValueError(f"rank-pattern: found '{text}', expected NAME=R or NAME=C,R such as linear1=4")
    return name, parse_rank(rank)


def _show(table: list[list[str]], text: str, heading: str, notes: str) -> None:
    """A table on a terminal, plain text in a file or pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        typer.echo(f"{heading}\n\n{text}\n\n{notes}")
        return
    headings, *lines = table
    shown = Table(title=heading, caption=notes)
    for name in headings:
        shown.add_column(name, justify="left" if name in ("stack", "method", "layout") else "right")
    for index, line in enumerate(lines):
        shown.add_row(*line, end_section=headings[0] == "stack" and index % 3 == 2)
    console.print(shown)
