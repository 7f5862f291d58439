"""``tcurlora merge``: the base with the adapter in its weights, and what rounding took away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcurlora_ext.cli.options import console, mapping

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch import dtype as Dtype


def merge(
    source: Annotated[Path, typer.Argument(help="Run folder of finetune, or an adapter file.")],
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    method: Annotated[str, typer.Option(help="Method of the run.")] = "tcur",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    model: Annotated[str | None, typer.Option(help="Base of an adapter file, as `plan` takes it.")] = None,
    kwargs: Annotated[str, typer.Option(help="JSON object for --model.")] = "{}",
    weights: Annotated[Path | None, typer.Option(help="Base weights for --model: safetensors.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
) -> None:
    """Write the base model with W + dW in place of W, and what else was trained; report the loss by rounding."""
    import safetensors.torch

    from tcurlora_ext.cli.adapted import open_adapted
    from tcurlora_ext.cli.plan import parse_dtype
    from tcurlora_ext.io.atomic import write_bytes

    if output.is_dir():
        raise ValueError(f"{output}: found a folder, expected the name of a file to write")
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: the file exists; expected a new one, or --overwrite")
    precision = parse_dtype(dtype)
    assert precision is not None
    adapted = open_adapted(source, method, seed, model, mapping("kwargs", kwargs), weights)
    if adapted.model is None:
        raise ValueError(
            f"{source}: an adapter file alone holds no base weights, expected --model and --weights beside it"
        )
    state, losses = merged_state(adapted.model, precision)
    write_bytes(output, safetensors.torch.save(state, {"format": "pt"}))
    _show(losses, dtype)
    size = output.stat().st_size / 2**20
    typer.echo(f"{adapted.title}: merged in {dtype}, {len(state)} tensors, {size:,.1f} MiB written to {output}")


def merged_state(model: nn.Module, dtype: Dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The state of the plain model with W + dW, floating tensors in ``dtype``; and each layer's rounding loss by stack.

    W + dW is summed in float64 and rounded once. The loss ``|(merged - W) - dW| / |dW|`` is against the base as it is,
    so it holds the rounding of W too. Raises ValueError, naming the tensor, where ``dtype`` cannot hold a value.
    """
    import torch

    from tcurlora_ext.adapter.model.merge import rounding_loss
    from tcurlora_ext.adapter.model.structure import CONTAINER, adapted_layers, stacks

    names = {id(stack): name for name, stack in stacks(model).items()}
    losses: dict[str, dict[str, float]] = {name: {} for name in names.values()}
    state = {name: value for name, value in model.state_dict().items() if CONTAINER not in name.split(".")}
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            total = layer.summed_weight(dtype)
            losses[names[id(layer.stack)]][name] = rounding_loss(layer, total)
            state[f"{name}.weight"] = layer.as_matrix(total)
        # Tied tensors are written under each of their names: safetensors refuses shared memory.
        state = {
            name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous().clone()
            for name, value in state.items()
        }
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: the merged value is not finite in {dtype}; expected a dtype that holds it")
    return state, losses


def _show(losses: dict[str, dict[str, float]], dtype: str) -> None:
    from rich.table import Table

    from tcurlora_ext.adapter.model.merge import ROUNDING_WARNING

    table = Table("stack", "layers", "rounding loss, mean", "largest", "in", box=None, header_style="bold")
    for name, layers in losses.items():
        worst = max(layers, key=lambda layer: layers[layer])
        mean = sum(layers.values()) / len(layers)
        table.add_row(name, str(len(layers)), f"{mean:.3g}", f"{layers[worst]:.3g}", worst)
    console().print(table)
    largest = max(loss for layers in losses.values() for loss in layers.values())
    if largest > ROUNDING_WARNING:
        typer.echo(
            f"warning: rounding to {dtype} changed a dW by up to {largest:.0%} of its norm; float32 would keep it",
            err=True,
        )
