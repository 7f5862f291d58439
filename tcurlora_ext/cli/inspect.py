"""``tcurlora inspect``: the features that each stack selected and its deltas, as tables, JSON and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import rich_table, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from tcurlora_ext.adapter.subspace import Subspace
    from tcurlora_ext.analysis.directions import DirectionsInspection
    from tcurlora_ext.analysis.inspection import StackInspection


def inspect(
    source: options.Source,
    method: options.Method = None,
    seed: options.Seed = 0,
    model: options.BaseModel = None,
    kwargs: options.Kwargs = None,
    weights: options.Weights = None,
    subspace: options.SubspaceFile = None,
    stack: Annotated[list[str] | None, typer.Option(help="Only the stack of this name; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for pictures and inspection.json. Default: inspect/ beside a run's adapter, or inspect/NAME/ "
            "beside the file NAME.safetensors."
        ),
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Whether to draw pictures.")] = True,
) -> None:
    """Show the selected features and their scores, and the norm of dW per layer and its energy per frequency.

    dW needs the base weights, so an adapter file without --model and --weights shows the core U alone. Of learned
    factors, and of a subspace's own file, it shows how much of the learned change they hold, how large it was beside
    the weights and, with the base weights, where the directions lie beside the weights' own leading singular vectors.
    """
    from tcurlora_ext.analysis.directions import inspect_subspace, subspace_json
    from tcurlora_ext.analysis.inspection import inspect_file, inspect_model
    from tcurlora_ext.analysis.remarks import remarks
    from tcurlora_ext.cli.adapted import open_adapted
    from tcurlora_ext.io.atomic import write_with
    from tcurlora_ext.io.records import write_json
    from tcurlora_ext.segmentation.packages import require_package

    if pictures:
        require_package("matplotlib")
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output}: found a file, expected a folder or nothing")
    adapted = open_adapted(source, method, seed, model, kwargs or {}, weights, subspace)
    found = []
    if adapted.file is not None and adapted.model is None:
        found = inspect_file(adapted.file)
    elif adapted.model is not None and not adapted.of_subspace:
        found = inspect_model(adapted.model)
    directions = [] if adapted.subspace is None else inspect_subspace(adapted.subspace, adapted.model)
    names = [one.name for one in (directions if adapted.of_subspace else found)]
    unknown = sorted(set(stack or ()) - set(names))
    if unknown:
        raise ValueError(f"stack: found {', '.join(unknown)}, expected among {', '.join(names)}")
    found = [one for one in found if not stack or one.name in stack]
    directions = [one for one in directions if not stack or one.name in stack]
    shown = terminal()
    shown.print(adapted.title, highlight=False, soft_wrap=True)
    content: dict[str, Any] = {"source": adapted.title, "stacks": [one.to_json() for one in found]}
    if adapted.subspace is not None:
        _show_directions(adapted.subspace, directions, shown)
        content["subspace"] = subspace_json(adapted.subspace, directions)
    if found:
        content["remarks"] = remarks(found)
        shown.print(f"\n{content['remarks']}", highlight=False, markup=False)
    for one in found:
        _show(one, shown)
    # Not for all files of a folder the same one: each would replace the pictures of the one before.
    file = adapted.source if adapted.of_subspace else adapted.file.path if adapted.file is not None else None
    folder = output or adapted.folder / "inspect" / ("" if file is None else file.stem)
    write_json(folder / "inspection.json", content)
    names = ["inspection.json"]
    if pictures:
        from tcurlora_ext.cli.pictures import draw

        for one in found:
            for kind, figure in draw(one):
                names.append(f"{one.name}_{kind}.png")
                write_with(folder / names[-1], figure.savefig)
    typer.echo(f"\nwritten to {folder}: {', '.join(names[:7])}{' ...' if len(names) > 7 else ''}")


def _show_directions(subspace: Subspace, found: list[DirectionsInspection], shown: Console) -> None:
    """The table of a subspace: a line for each stack."""
    shown.print(f"\n{subspace}", highlight=False, soft_wrap=True)
    about = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in subspace.about.items()
    )
    shown.print(f"{about}\n", highlight=False, markup=False, soft_wrap=True)
    lines, angles = [], any(one.left_cosines for one in found)
    for one in found:
        more = f" and {len(one.names) - 1} more" if len(one.names) > 1 else ""
        cells = [
            f"{one.shape[0]} x {one.shape[1]}",
            "{}, {}".format(*one.rank),
            f"{one.energy:.1%}",
            f"{one.change:.3g}",
        ]
        if angles:
            cells += [f"{max(cosines):.3f}" if cosines else "-" for cosines in (one.left_cosines, one.right_cosines)]
        lines.append([one.name, one.names[0] + more, *cells])
    header = ["stack", "modules", "out x in", "c, r", "energy", "|change| / |W|"]
    header += ["cosine, left", "cosine, right"] if angles else []
    shown.print(rich_table(tuple(header), lines, left=(0, 1)))
    shown.print("Energy: the share of the learned change within the directions.", markup=False)
    if angles:
        shown.print(
            "Cosine: of the smallest angle to as many leading singular vectors of W, the largest of all frequencies.",
            markup=False,
        )


def _show(one: StackInspection, shown: Console) -> None:
    """The tables of one stack: selected features, layers, frequencies."""
    base = one.base
    c, r = one.rank
    slices = f"{len(one.names)} slices" if len(one.names) > 1 else "1 slice"
    shape = "" if base is None else f" of {base.shape[0]} x {base.shape[1]}"
    features = f"selection {one.selection}" if one.columns or one.rows else "learned factors"
    shown.print(
        f"\nstack {one.name}: {slices}{shape}, rank (c, r) = ({c}, {r}), {one.transform}, "
        f"{features}, scale {one.scale:.4g}", highlight=False, soft_wrap=True,
    )  # fmt: skip

    if one.columns or one.rows:
        _show_selected(one, shown)

    layers = []
    for index, name in enumerate(one.names):
        cells = [f"{one.core_norms[index]:.4g}"]
        if base is not None:
            delta, norm = base.delta_norms[index], base.base_norms[index]
            cells += [f"{delta:.4g}", f"{delta / norm:.4g}" if norm else "-"]
        layers.append([str(index), name, *cells])
    norms = ("|U|",) if base is None else ("|U|", "|dW|", "|dW| / |W|")
    shown.print(rich_table(("slice", "module", *norms), layers, left=(0, 1)))

    if len(one.core_energy) > 1:
        shares = [[str(k), _share(energy, one.core_energy)] for k, energy in enumerate(one.core_energy)]
        if base is not None:
            shares = [[*line, _share(base.delta_energy[int(line[0])], base.delta_energy)] for line in shares]
        header = ("frequency", "share of |U|^2", "share of |dW|^2")
        shown.print()
        shown.print(rich_table(header[: len(shares[0])], shares))


def _show_selected(one: StackInspection, shown: Console) -> None:
    """The table of the selected features."""
    selected = []
    for index in range(max(len(one.columns), len(one.rows))):
        cells = []
        for labels, scores in zip(one.labels, (one.column_scores, one.row_scores), strict=True):
            cells += [labels[index], f"{scores[index]:.4g}"] if index < len(labels) else ["", ""]
        selected.append([str(index + 1), *cells])
    columns, rows = one.headings
    shown.print(rich_table(("order", columns, "score", rows, "score"), selected))
    said = "Every slice has the same features. " if len(one.names) > 1 else ""
    if any(name.endswith("]") for name in one.names):
        said += "[b] is the b-th block of rows of a fused module."
    shown.print(f"{said.rstrip()}\n" if said else "", markup=False)


def _share(part: float, parts: list[float]) -> str:
    total = sum(parts)
    return f"{part / total:.2%}" if total else "-"
