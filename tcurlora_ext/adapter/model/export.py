"""An adapted model without this package's operator: for exporters, and for run times that know PyTorch's alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.transforms import TRANSFORMS
from tcurlora_ext.maths.transforms.base import phases_on
from tcurlora_ext.operator import decomposition

from .inject import remove
from .merge import merge
from .structure import adapted_layers

PHASES = ("phases_single", "phases_cos", "phases_sin")


class ExportedStack(TCURStack):
    """A stack whose layers compute ``x W^T + b + (h B^T) col^T``, ``h = x row^T``, in plain matrix products.

    The blocks of B are made of the core in each call, a few operations on r*c*S numbers: all layers follow from one
    parameter, so that another adapter of the same base is another core. Constants, which are not in the state_dict:

    phases_single, phases_cos, phases_sin   of B, for all slices
    fold   (S, S), the slice transform of a core in the domain "slice"
    """

    fold: Tensor

    @classmethod
    @torch.no_grad()
    def become(cls, stack: TCURStack) -> None:
        """Turn a stack into an exported one in place, so that its container and its layers still hold it."""
        core = stack.core
        along = stack.options.along
        call = along.call_shape(stack.slices, 1, stack.blocks)
        folded = TRANSFORMS[call.transform]
        constants = phases_on(folded, call.blocks, 0, call.blocks, core.device, core.dtype)
        for name, constant in zip(PHASES, constants, strict=True):
            stack.register_buffer(name, constant.clone(), persistent=False)
        unit = torch.eye(stack.slices, dtype=core.dtype, device=core.device)
        stack.register_buffer("fold", along.fold(unit[:, :, None])[:, :, 0], persistent=False)
        stack.__class__ = cls

    def core_fourier(self) -> Tensor:
        if self.options.core_domain == "fourier":
            return self.core
        return (self.fold @ self.core.flatten(1)).view_as(self.core)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Factors) -> Tensor:
        own = slice(call.first_slice, call.first_slice + call.num_slices)
        return decomposition.linear(x, weight, bias, call, tuple(self.get_buffer(name)[own] for name in PHASES))


def plain_copy(model: nn.Module, merged: bool = False) -> nn.Module:
    """A copy of an adapted model that computes in PyTorch's own operations, for ``torch.export`` and ``torch.onnx``.

    Args:
        model: An adapted model; it stays as it is.
        merged: False: every adapted layer is its base product and the adapter's three matrix products, as small as the
            adapted model, and the cores are parameters under the names that they had. True: plain layers of W + dW, as
            :func:`remove` leaves them after :func:`merge`.

    Returns:
        The copy, on the same device.

    Raises:
        ValueError: The model is not adapted, or a merged weight would not be finite.
    """
    plain_model = copy.deepcopy(model)
    if merged:
        return remove(merge(plain_model))
    layers = [layer for _, layer in adapted_layers(plain_model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not adapted; call inject(model) first")
    for layer in layers:
        layer.unmerge()
        if not isinstance(layer.stack, ExportedStack):
            ExportedStack.become(layer.stack)
    return plain_model
