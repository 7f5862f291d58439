"""Checkpoints without C and R where the base gives them: the chosen indices, and a fingerprint of the base weights.

For every stack such a checkpoint has the core, ``rows``, ``columns`` and ``scale``, ``tcurlora_fingerprint.<stack>``,
and ``tcurlora_base_dtype.<stack>``, an empty tensor of the base's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.factors import take_factors
from tcurlora_ext.adapter.stack.slices import stacked_in_order
from tcurlora_ext.maths.fingerprint import fingerprint, mismatch
from tcurlora_ext.maths.selection import Selection

from .layer import TcurLoraLinear
from .sharing import FACTORS

BASE = ("fingerprint", "base_dtype")


def stack_key(adapter_name: str, stack: str, kind: str) -> str:
    """The key of a stack's tensor in the state_dict of a PeftModel."""
    return f"base_model.tcurlora_core.{adapter_name}.{stack}.{kind}"


def saved_key(stack: str, kind: str) -> str:
    """The key of a stack's tensor in a checkpoint, without the adapter's name."""
    return f"base_model.tcurlora_{kind}.{stack}"


def layers_of(model: nn.Module, stack: TCURStack) -> list[TcurLoraLinear]:
    """The layers of an adapter's stack."""
    return [layer for layer in model.modules() if isinstance(layer, TcurLoraLinear) and layer.slices_in(stack)]


def base_weights(model: nn.Module, stack: TCURStack, adapter_name: str) -> Tensor:
    """The present base weights (S, out, in) of a stack's layers, without any merged adapter."""
    return stacked_in_order(
        (layer.slices[adapter_name].first_slice, layer.weight_slices(adapter_name)) for layer in layers_of(model, stack)
    )


def without_factors(
    model: nn.Module, stacks: dict[str, TCURStack], adapter_name: str, state: dict[str, Tensor], always: bool
) -> dict[str, Tensor]:
    """The state to save, with a fingerprint of the base weights in place of C and R that the base gives.

    Args:
        model: Holds the adapter.
        stacks: Its stacks by name.
        adapter_name: The adapter.
        state: Its tensors as PEFT saves them.
        always: False: only where every loading of the base gives C and R to the bit.
    """
    state = dict(state)
    for name, stack in stacks.items():
        if not always and not _comes_again(model, stack):
            continue
        base = base_weights(model, stack, adapter_name)
        # With orthonormal factors of two adapters side by side, a sum is not what the base gives.
        if (stack.options.orthonormal or not always) and not stack.is_of(base):
            continue
        for kind in FACTORS:
            state.pop(stack_key(adapter_name, name, kind), None)
        for kind, value in zip(BASE, (fingerprint(base), torch.empty(0, dtype=base.dtype)), strict=True):
            state[stack_key(adapter_name, name, kind)] = value
    return state


def _comes_again(model: nn.Module, stack: TCURStack) -> bool:
    """Whether another loading of the base gives the weights of a stack's layers to the bit.

    A quantised base need not come out the same again. It cannot be told where the weights are elsewhere: on the meta
    device, or spread over processes, not all of which need be saving.
    """
    for layer in layers_of(model, stack):
        if layer.quantization_backend is not None:
            return False
        weight = layer.get_base_layer().weight
        if weight.is_meta or weight.numel() == 0 or hasattr(weight, "full_tensor"):
            return False
    return True


def with_factors(
    model: nn.Module, stacks: dict[str, TCURStack], adapter_name: str, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of :func:`without_factors`: C and R are taken from the model's base weights by the saved indices.

    Raises ValueError where these are not the weights on which the adapter was trained.
    """
    state = dict(state)
    for name, stack in stacks.items():
        found = [state.pop(saved_key(name, kind), None) for kind in BASE]
        saved, dtype = found
        rows, columns = (state.get(stack_key(adapter_name, name, kind)) for kind in ("rows", "columns"))
        if saved is None or dtype is None or rows is None or columns is None:
            continue
        base = base_weights(model, stack, adapter_name)
        if base.is_meta:
            raise ValueError(f"stack {name}: C and R are not in the checkpoint, and the base weights are on meta")
        other = mismatch(saved.cpu(), fingerprint(base), str(dtype.dtype).removeprefix("torch."), base.dtype)
        if other:
            raise ValueError(
                f"stack {name}: trained on other base weights: {len(other)} of {len(saved)} slices differ, first "
                f"{stack.names[other[0]]}. Load it onto the weights it was trained on, or save it with "
                "save_projection=True"
            )
        rows, columns = rows.to(base.device), columns.to(base.device)
        chosen = Selection(rows, columns, torch.zeros(len(rows)), torch.zeros(len(columns)))
        taken = take_factors(base, chosen, stack.options)
        for kind, factor in zip(FACTORS, (taken.col, taken.row), strict=True):
            state[stack_key(adapter_name, name, kind)] = factor
    return state
