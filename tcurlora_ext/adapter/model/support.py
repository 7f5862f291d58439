"""Which modules can be adapted, and why another one cannot."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tcurlora_ext.adapter.layer.carried import TCURCarried, carried_type
from tcurlora_ext.adapter.layer.convolution import TCURConv, conv_matrix, conv_type, reason_against_conv
from tcurlora_ext.adapter.layer.experts import HeldExperts, TCURExperts
from tcurlora_ext.adapter.layer.linear import TCURConv1D, TCURLayer, TCURLinear
from tcurlora_ext.adapter.layer.parameter import HeldParameter, TCURParameter
from tcurlora_ext.adapter.layer.quantised import can_dequantise, is_quantised
from tcurlora_ext.adapter.layer.subclassed import TCURSubclassed, computes_linear, subclassed_type

EXPECTED = "expected nn.Linear, a convolution or transformers' Conv1D"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, recognised by its class name: transformers need not be installed."""
    return any(t.__name__ == "Conv1D" and t.__module__.startswith("transformers.") for t in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, adapted or not: nn.Linear, a subclass of it, or transformers' Conv1D.

    So is a :class:`HeldParameter`, a parameter that its module reads, as a layer.
    """
    return isinstance(module, (nn.Linear, TCURConv1D, HeldParameter)) or is_conv1d(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, adapted or not, whether it can be adapted or not."""
    return isinstance(module, _ConvNd)


def matrix_of(module: nn.Module, stored: Tensor) -> Tensor:
    """The weight of a layer as a matrix (out, in), sharing memory; transformers' Conv1D stores (in, out).

    Args:
        module: A linear layer or a convolution, adapted or not.
        stored: A tensor like its weight.
    """
    if is_convolution(module):
        return conv_matrix(module, stored)
    return stored if isinstance(module, nn.Linear) else stored.T


def features_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's matrix; of a quantised one, too, whose weight has another shape, and of one expert."""
    if isinstance(module, HeldParameter):
        return module.features
    if isinstance(module, _ConvNd):
        return conv_features(module)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1], weight.shape[0]  # Conv1D stores (in, out)


def conv_features(conv: _ConvNd) -> tuple[int, int]:
    """(out, in*k^d) of a convolution, (out*k^d, in) of a transposed one."""
    first, second, *kernel = conv.weight.shape
    return (second * prod(kernel), first) if conv.transposed else (first, second * prod(kernel))


def adapted_type(module: nn.Module) -> type[TCURLayer] | None:
    """The class of the adapted layer for a module; None where the module cannot be adapted.

    A subclass of ``nn.Linear`` or of a convolution is adapted where it computes the same. One with a forward pass of
    its own may use its weight in another way, and the adapter would silently have no effect. A quantised layer keeps
    its own forward pass.
    """
    if isinstance(module, HeldParameter):
        held = TCURExperts if isinstance(module, HeldExperts) else TCURParameter
        return held if module.weight.is_floating_point() and module.weight.element_size() > 1 else None
    if is_quantised(module):
        return carried_type(type(module)) if can_dequantise(module) else None
    kind = type(module)
    if isinstance(module, _ConvNd):
        whole = not reason_against_conv(module) and not parametrize.is_parametrized(module)
        return conv_type(type(module)) if whole else None
    if issubclass(kind, nn.Linear):
        return subclassed_type(kind) if computes_linear(kind) and not parametrize.is_parametrized(module) else None
    return TCURConv1D if is_conv1d(module) else None


def plain_type(layer: TCURLayer) -> type[nn.Module]:
    """The inverse of :func:`adapted_type`."""
    if isinstance(layer, (TCURCarried, TCURConv, TCURSubclassed)):
        return layer.kind
    if isinstance(layer, TCURParameter):
        return HeldExperts if isinstance(layer, TCURExperts) else HeldParameter
    if isinstance(layer, TCURLinear):
        return nn.Linear
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def class_of(module: nn.Module) -> str:
    """The name of a module's class, with that of its package where it is not PyTorch's own ``torch.nn``."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"


def reason_against(module: nn.Module) -> str:
    """Why a module cannot be adapted, as it follows on "... cannot be adapted: "; "" where it can."""
    if is_made_anew(module):
        return "its weight is made anew in each call (weight_norm, spectral_norm, pruning or a parametrization)"
    if adapted_type(module) is None:
        if isinstance(module, HeldParameter):
            return f"it is quantised, {module.weight.dtype}, expected a floating dtype of 16 bits or more"
        if is_quantised(module):
            return f"it is quantised, a {class_of(module)} whose weight PEFT cannot read, or PEFT is not installed"
        if is_convolution(module):
            return reason_against_conv(module)
        return f"found a {class_of(module)}, {EXPECTED}"
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_complex():
        return f"its weight is {weight.dtype}, expected a floating dtype"
    if "forward" in vars(module):
        return "its forward was replaced on the instance; an adapter in it would not be called"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled in place and would go on calling what was compiled; call inject before compile"
    return ""


def is_read_by_attention(module: nn.Module) -> bool:
    """Whether this is the output projection of nn.MultiheadAttention, which reads its weight and never calls it."""
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def is_made_anew(module: nn.Module) -> bool:
    """Whether ``weight`` is not a parameter of the module but made from others in each call."""
    if parametrize.is_parametrized(module, "weight"):
        return True
    return "weight" not in module._parameters and any(name.startswith("weight_") for name in module._parameters)


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight of its own that a user may have meant, such as a convolution."""
    return isinstance(module, nn.Linear) or any(p.dim() > 1 for p in module.parameters(recurse=False))


def refuse(name: str, module: nn.Module) -> None:
    """Raise ValueError, with the module's name and the reason, where a module cannot be adapted."""
    reason = reason_against(module)
    if reason:
        raise ValueError(f"{name} cannot be adapted: {reason}")
