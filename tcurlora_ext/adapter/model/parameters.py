"""Weights that a module has as parameters of its own and that can be adapted there, and what is done to their module.

They are the projections of ``nn.MultiheadAttention`` and the experts of transformers 5. ``nn.TransformerEncoderLayer``
and ``nn.TransformerEncoder`` around adapted layers go without their fast path, which reads weights and calls no layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from tcurlora_ext.adapter.layer.attention import TCURMultiheadAttention
from tcurlora_ext.adapter.layer.experts import HeldExperts
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.layer.parameter import HeldParameter, TCURParameter, put_layer, put_parameter

# Attribute of a module with a fast path -> the value without one.
_FAST_PATHS: dict[type[nn.Module], tuple[str, int | bool]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_NOTE = "tcur_fast_path"  # the value before


def held_in(module: nn.Module) -> dict[str, HeldParameter]:
    """The parameters of a module that can be adapted, or could but for a reason of their own, by their names in it.

    Args:
        module: The module; of one that is adapted, those that are not.
    """
    transposed = getattr(module, "is_transposed", None)
    own_parameters = {own: p for own, p in module._parameters.items() if p is not None}
    held: dict[str, HeldParameter] = {}
    if isinstance(module, nn.MultiheadAttention):
        parts = {own: p for own, p in own_parameters.items() if own.endswith("proj_weight")}
        held = {own: HeldParameter(p, 3 if own == "in_proj_weight" else 1) for own, p in parts.items()}
    elif isinstance(transposed, bool) and hasattr(module, "num_experts"):
        parts = {own: p for own, p in own_parameters.items() if p.dim() == 3 and own.endswith("_proj")}
        held = {own: HeldExperts(p, transposed) for own, p in parts.items()}
    return {own: layer.train(module.training) for own, layer in held.items()}


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model but itself by name, and after each module its parameters as layers (:func:`held_in`)."""
    for name, module in model.named_modules():
        if name:
            yield name, module
        for own, held in held_in(module).items():
            yield f"{name}.{own}".lstrip("."), held


def reads_itself(model: nn.Module) -> dict[str, str]:
    """The weights that a subclass of ``nn.MultiheadAttention`` may read in its own way: name -> reason."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, nn.MultiheadAttention) and kind not in (nn.MultiheadAttention, TCURMultiheadAttention):
            for own in (*held_in(module), "out_proj"):
                reason = f"{kind.__name__}, a subclass of nn.MultiheadAttention, reads its weight and does not call it"
                found[f"{name}.{own}".lstrip(".")] = reason
    return found


def reader_of(model: nn.Module, name: str) -> nn.Module | None:
    """The module that reads a weight in place of calling its layer; None where the layer is called.

    Args:
        model: The model.
        name: The name of the layer, or of the parameter.
    """
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    attention = isinstance(owner, nn.MultiheadAttention) and own == "out_proj"
    return owner if attention or own in held_in(owner) else None


def put_in_place(model: nn.Module, name: str, layer: TCURParameter) -> None:
    """Put an adapted layer in the place of a parameter of the model.

    Args:
        model: The model.
        name: The parameter's name in it.
        layer: The layer.
    """
    parent, _, own = name.rpartition(".")
    put_layer(model.get_submodule(parent), own, layer, layer)


def put_back(model: nn.Module, name: str, plain: HeldParameter) -> None:
    """The inverse of :func:`put_in_place`.

    Args:
        model: The model.
        name: The parameter's name in it.
        plain: The layer without its adapter.
    """
    parent, _, own = name.rpartition(".")
    put_parameter(model.get_submodule(parent), own, plain)


def let_call(model: nn.Module) -> None:
    """Let the modules around adapted layers call them, which read their weights until now."""
    for module in model.modules():
        if not isinstance(module, (nn.MultiheadAttention, *_FAST_PATHS)) or not any(
            isinstance(inner, TCURLayer) for inner in module.modules()
        ):
            continue
        if type(module) is nn.MultiheadAttention:
            module.__class__ = TCURMultiheadAttention
        for kind, (attribute, without) in _FAST_PATHS.items():
            if isinstance(module, kind) and _NOTE not in vars(module):
                vars(module)[_NOTE] = getattr(module, attribute, without)
                setattr(module, attribute, without)


def let_read(model: nn.Module) -> None:
    """The inverse of :func:`let_call`, for a model whose adapted layers are gone."""
    for module in model.modules():
        if type(module) is TCURMultiheadAttention:
            cast("nn.Module", module).__class__ = nn.MultiheadAttention
        for kind, (attribute, _) in _FAST_PATHS.items():
            if isinstance(module, kind) and _NOTE in vars(module):
                setattr(module, attribute, vars(module).pop(_NOTE))


def quantised_experts(model: nn.Module) -> dict[str, str]:
    """The parameters of experts that are packed in a few bits: name -> reason."""
    found = {}
    for name, module in model.named_modules():
        if re.search("experts", type(module).__name__, re.IGNORECASE) and not isinstance(module, TCURLayer):
            for own, tensor in (*module._parameters.items(), *module._buffers.items()):
                if isinstance(tensor, Tensor) and tensor.element_size() < 2 and tensor.dim() > 1:
                    called = f"{name}.{own}".lstrip(".")
                    found[called] = f"the experts are quantised: {type(module).__name__}.{own} is {tensor.dtype}"
    return found
