"""``tcurlora inspect``: what each stack chose and what it changes, as tables, numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcurlora_ext.cli.options import console, mapping

if TYPE_CHECKING:
    from rich.console import Console

    from tcurlora_ext.analysis.inspection import StackInspection


def inspect(
    source: Annotated[Path, typer.Argument(help="Run folder of finetune, or an adapter file.")],
    method: Annotated[str, typer.Option(help="Method of the run.")] = "tcur",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    model: Annotated[str | None, typer.Option(help="Base of an adapter file, as `plan` takes it.")] = None,
    kwargs: Annotated[str, typer.Option(help="JSON object for --model.")] = "{}",
    weights: Annotated[Path | None, typer.Option(help="Base weights for --model: safetensors.")] = None,
    stack: Annotated[list[str] | None, typer.Option(help="Only this stack; may be given again.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for pictures and numbers. Default: inspect/ beside what is inspected.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures.")] = True,
) -> None:
    """Chosen features and their scores, and the norm of dW per layer and frequency. An adapter file alone lacks dW."""
    from tcurlora_ext.analysis.inspection import inspect_file, inspect_model
    from tcurlora_ext.cli.adapted import open_adapted
    from tcurlora_ext.io.atomic import write_with
    from tcurlora_ext.io.records import write_json
    from tcurlora_ext.segmentation.packages import require_package

    if pictures:
        require_package("matplotlib")
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output}: found a file, expected a folder or nothing")
    adapted = open_adapted(source, method, seed, model, mapping("kwargs", kwargs), weights)
    if adapted.model is not None:
        found = inspect_model(adapted.model)
    else:
        assert adapted.file is not None
        found = inspect_file(adapted.file)
    unknown = sorted(set(stack or ()) - {one.name for one in found})
    if unknown:
        raise ValueError(f"stack: found {', '.join(unknown)}, expected among {', '.join(one.name for one in found)}")
    found = [one for one in found if not stack or one.name in stack]
    shown = console()
    shown.print(adapted.title, highlight=False, soft_wrap=True)
    for one in found:
        _show(one, shown)
    folder = output or adapted.folder / "inspect"
    write_json(folder / "inspection.json", {"source": adapted.title, "stacks": [one.to_json() for one in found]})
    names = ["inspection.json"]
    if pictures:
        from tcurlora_ext.cli.pictures import draw

        for one in found:
            for kind, figure in draw(one):
                names.append(f"{one.name}_{kind}.png")
                write_with(folder / names[-1], figure.savefig)
    typer.echo(f"\nwritten to {folder}: {', '.join(names[:7])}{' ...' if len(names) > 7 else ''}")


def _show(one: StackInspection, shown: Console) -> None:
    """The tables of a stack."""
    from rich.table import Table

    base = one.base
    c, r = one.rank
    shape = "" if base is None else f" of {base.shape[0]} x {base.shape[1]}"
    shown.print(
        f"\nstack {one.name}: {len(one.names)} slices{shape}, rank (c, r) = ({c}, {r}), {one.transform}, "
        f"selection {one.selection}, scale {one.scale:.4g}", highlight=False, soft_wrap=True,
    )  # fmt: skip

    chosen = Table("order", "input feature", "score", "output feature", "score", box=None, header_style="bold")
    for index in range(max(c, r)):
        cells = []
        for ids, scores in ((one.columns, one.column_scores), (one.rows, one.row_scores)):
            cells += [str(ids[index]), f"{scores[index]:.4g}"] if index < len(ids) else ["", ""]
        chosen.add_row(str(index + 1), *cells)
    shown.print(chosen)
    shown.print("The same features in every slice; [b] is the b-th block of rows of a fused module.\n", markup=False)

    layers = Table("slice", "module", "|U|", box=None, header_style="bold")
    if base is not None:
        layers.add_column("|dW|")
        layers.add_column("|dW| / |W|")
    for index, name in enumerate(one.names):
        cells = [f"{one.core_norms[index]:.4g}"]
        if base is not None:
            delta, norm = base.delta_norms[index], base.base_norms[index]
            cells += [f"{delta:.4g}", f"{delta / norm:.4g}" if norm else "-"]
        # A name's [0] is no markup.
        layers.add_row(str(index), name.replace("[", r"\["), *cells)
    shown.print(layers)

    if one.core_energy:
        frequencies = Table("frequency", "part of |U|^2", box=None, header_style="bold")
        if base is not None:
            frequencies.add_column("part of |dW|^2")
        for k, energy in enumerate(one.core_energy):
            cells = [_share(energy, one.core_energy)]
            cells += [] if base is None else [_share(base.delta_energy[k], base.delta_energy)]
            frequencies.add_row(str(k), *cells)
        shown.print()
        shown.print(frequencies)


def _share(part: float, parts: list[float]) -> str:
    total = sum(parts)
    return f"{part / total:.2%}" if total else "-"
