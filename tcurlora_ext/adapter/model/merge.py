"""Merging the adapter of a whole model into its weights, and undoing it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.linear import TCURLayer

from .effect import warn_without_effect
from .structure import adapted_layers, require_adapted

ROUNDING_WARNING = 0.1


def merge(model: nn.Module) -> nn.Module:
    """Replace the weight W of every adapted layer by W + dW, in place. Layers already merged are not changed.

    The sum is computed in float64 and rounded once to the weights' dtype. W is kept for :func:`unmerge`, which doubles
    the memory of the adapted weights until :func:`remove` is called.

    Args:
        model: An adapted model.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted, it is sharded over processes, or a merged weight would not be finite;
            nothing is changed.

    Warns:
        UserWarning: Rounding changes a dW by more than a tenth of its norm, as happens to a small dW in bfloat16; or
            adapted layers were never called, or cores never trained, while others, or parameters beside them, were.
    """
    adapted = require_adapted(model)
    refuse_sharded(model, "save the adapter, load it onto the base in one process and merge there")
    warn_without_effect(adapted)
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
    """Restore every merged W, bit for bit, in place.

    Args:
        model: An adapted model; layers that are not merged are not changed.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted.
    """
    require_adapted(model)
    for _, layer in adapted_layers(model):
        layer.unmerge()
    return model


@torch.no_grad()
def rounding_loss(layer: TCURLayer, merged: Tensor) -> float:
    """The change of a layer's dW by rounding, ``|(merged - W) - dW| / |dW|`` in Frobenius norms."""
    delta = layer.delta_weight().double()
    norm = delta.norm()
    error = (merged.double() - layer.weight_slices().flatten(0, 1) - delta).norm()
    return float(error / norm) if norm > 0 else 0.0
