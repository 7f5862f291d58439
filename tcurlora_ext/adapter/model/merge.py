"""Merge the adapter of a whole model into its weights, and take it out again."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.linear import TCURLayer

from .structure import adapted_layers, require_container

ROUNDING_WARNING = 0.1


def merge(model: nn.Module) -> nn.Module:
    """Put W + dW in the place of every adapted W, in place. Layers that are merged stay as they are.

    The sum is made in float64 and rounded once to the weights' dtype. W is kept for :func:`unmerge`: memory for the
    adapted weights doubles until :func:`remove`.

    Args:
        model: An adapted model.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted, it is sharded over processes, or a merged weight would not be finite;
            nothing is changed.

    Warns:
        UserWarning: Rounding changes a dW by more than a tenth of its norm, as bfloat16 does to a small one.
    """
    require_container(model)
    refuse_sharded(model, "save the adapter, load it onto the base in one process and merge there")
    merged: list[tuple[TCURLayer, Tensor]] = []
    worst = 0.0
    for name, layer in adapted_layers(model):
        if layer.merged:
            continue
        try:
            merged.append((layer, layer.merged_weight()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        worst = max(worst, rounding_loss(*merged[-1]))
    for layer, weight in merged:
        layer.put_merged(weight)
    if worst > ROUNDING_WARNING:
        dtype = str(merged[0][1].dtype).removeprefix("torch.")
        warnings.warn(
            f"rounding to {dtype} changed a merged dW by up to {worst:.0%} of its norm; merge in float32 to keep it",
            stacklevel=2,
        )
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put every W back, bit for bit, in place.

    Args:
        model: An adapted model; layers that are not merged stay as they are.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted.
    """
    require_container(model)
    for _, layer in adapted_layers(model):
        layer.unmerge()
    return model


@torch.no_grad()
def rounding_loss(layer: TCURLayer, merged: Tensor) -> float:
    """``|(merged - W) - dW| / |dW|``, Frobenius norms: how much of a layer's dW rounding took away or added."""
    delta = layer.delta_weight().double()
    norm = delta.norm()
    error = (merged.double() - layer.weight_slices().flatten(0, 1) - delta).norm()
    return float(error / norm) if norm > 0 else 0.0
