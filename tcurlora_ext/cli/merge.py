"""``tcurlora merge``: the base weights with the adapter added, and how much of dW rounding removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.io.table import file_size, rich_table, terminal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch import dtype as Dtype


def merge(
    source: options.Source,
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    dtype: Annotated[
        Any, typer.Option(parser=options.dtype, metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    method: options.Method = None,
    seed: options.Seed = 0,
    model: options.BaseModel = None,
    kwargs: options.Kwargs = None,
    weights: options.Weights = None,
    subspace: options.SubspaceFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
) -> None:
    """Write the base model with W + dW in place of W, and what was trained beside; report the rounding loss.

    Of a run, other methods than tCUR are folded in too, where the plain network can express them.
    """
    import safetensors.torch

    from tcurlora_ext.cli.adapted import is_tcur, open_adapted
    from tcurlora_ext.io.atomic import write_bytes

    if output.is_dir():
        raise ValueError(f"{output}: found a folder, expected the name of a file to write")
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: the file exists; expected a new one, or --overwrite")
    name = str(dtype).removeprefix("torch.")
    if method is not None and (source / "network.json").is_file() and not is_tcur(method):
        title, (state, lost) = f"{source}, {method}, seed {seed}", folded_state(source, method, seed, dtype)
        if lost:
            _show({method: lost}, name, "method", "tensor")
    else:
        adapted = open_adapted(source, method, seed, model, kwargs or {}, weights, subspace)
        title, (state, losses) = adapted.title, merged_state(adapted.require_adapter(), dtype)
        _show(losses, name)
    write_bytes(output, safetensors.torch.save(state, {"format": "pt"}))
    size = file_size(output.stat().st_size)
    typer.echo(f"{title}: merged in {name}, {len(state)} tensors, {size} written to {output}")


def folded_state(run: Path, method: str, seed: int, dtype: Dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state of the plain network with what another method than tCUR has learned, and the rounding loss.

    The method is folded in float64 and rounded once.

    Args:
        run: The run folder.
        method, seed: Which adapter of it.
        dtype: Of all floating-point tensors in the state.

    Returns:
        The tensors by the names of the base, on the CPU; and of each that the method changed the loss, as for
        `merged_state`.

    Raises:
        ValueError: The method computes something that no weights of the plain network do; or as for `merged_state`.
    """
    from tcurlora_ext.segmentation.methods import METHODS, base_name
    from tcurlora_ext.segmentation.runs.network import load_adapted, load_base

    network = load_adapted(run, method, seed).double()
    fold = METHODS[base_name(method)].merge
    if fold is not None:
        fold(network)
    state, base = network.state_dict(), load_base(run).state_dict()
    added = sorted(set(state) - set(base))
    if set(state) != set(base) and (fold is None or not added):
        raise ValueError(f"method: {method} adds layers that no weights of the plain network replace, expected another")
    if added:
        raise ValueError(
            f"method: {method} has {added[0]}, which the plain network has not ({len(added)} such tensors), so that no "
            "file of its weights can hold the result; METHODS[name].merge folds it in Python"
        )
    merged, losses = finite_state(state, dtype), {}
    for name, value in state.items():
        delta = value.double() - base[name]
        if value.is_floating_point() and (norm := delta.norm()) > 0:
            losses[name] = float((merged[name].double() - base[name] - delta).norm() / norm)
    return merged, losses


def finite_state(state: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Copies on the CPU, in ``dtype`` where they are floating-point; a ValueError names one that is not finite then."""
    import torch

    # Tied tensors are written under each of their names: safetensors refuses shared memory.
    result = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for name, value in state.items()
    }
    for name, value in result.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: the merged value is not finite in {dtype}; expected a dtype that holds it")
    return result


def merged_state(model: nn.Module, dtype: Dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The state of the plain model with W + dW in place of W, and the rounding loss of each layer.

    W + dW is summed in float64 and rounded once. The loss ``|(merged - W) - dW| / |dW|`` compares with the W that the
    model has, so it includes the rounding of W itself.

    Args:
        model: An adapted model.
        dtype: Of all floating-point tensors in the state.

    Returns:
        The tensors by the names they have in the plain model, on the CPU; and by stack, each layer's loss by its name.

    Raises:
        ValueError: A value is not finite in ``dtype``; the message names the tensor.
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
            state[layer.key_of(name)] = layer.as_matrix(total)
    return finite_state(state, dtype), losses


def _show(losses: dict[str, dict[str, float]], dtype: str, group: str = "stack", one: str = "layer") -> None:
    from tcurlora_ext.adapter.model.merge import ROUNDING_WARNING

    rows = []
    for name, layers in losses.items():
        worst = max(layers, key=lambda layer: layers[layer])
        mean = sum(layers.values()) / len(layers)
        rows.append([name, str(len(layers)), f"{mean:.3g}", f"{layers[worst]:.3g}", worst])
    header = (group, f"{one}s", "rounding loss, mean", "largest", f"in {one}")
    terminal().print(rich_table(header, rows, left=(0, 4)))
    largest = max(loss for layers in losses.values() for loss in layers.values())
    if largest > ROUNDING_WARNING:
        typer.echo(
            f"warning: rounding to {dtype} changed a {one}'s dW by up to {largest:.0%} of its norm; float32 keeps it",
            err=True,
        )
