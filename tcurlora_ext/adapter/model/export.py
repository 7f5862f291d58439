"""Exported models: adapted models without this package's operator, for exporters and runtimes of PyTorch operations."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.transforms import TRANSFORMS
from tcurlora_ext.maths.transforms.base import phases_on
from tcurlora_ext.operator import decomposition
from tcurlora_ext.operator.convolution import Geometry, composed, kernels_of

from .inject import remove
from .merge import merge
from .structure import adapted_layers

PHASES = ("phases_single", "phases_cos", "phases_sin")


class ExportedStack(TCURStack):
    """A stack whose layers compute ``x W^T + b + (h B^T) col^T`` with ``h = x row^T`` as matrix products of PyTorch.

    Each call computes the blocks of B from the core, in a few operations on r*c*S elements. The core stays the only
    parameter of all layers, so that another adapter for the same base and indices is another core. Constants, as
    buffers that are not in the state_dict:

    phases_single, phases_cos, phases_sin   the phases of B, for all slices
    fold   (S, S), the slice transform of a core in the domain "slice"
    """

    fold: Tensor

    @classmethod
    @torch.no_grad()
    def become(cls, stack: TCURStack) -> None:
        """Turn a stack into an exported stack in place, so that its container and its layers keep their reference."""
        stack.hold_columns()
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
        return decomposition.linear(x, weight, bias, call, self._phases(call))

    def _convolved(
        self,
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Sequence[int],
        call: Factors,
        geometry: Geometry,
    ) -> Tensor:
        kernels = kernels_of(call, shape, geometry.transposed, self._phases(call))
        return composed(x, seen, weight, bias, kernels, geometry)

    def _phases(self, call: Factors) -> tuple[Tensor, ...]:
        own = slice(call.first_slice, call.first_slice + call.num_slices)
        return tuple(self.get_buffer(name)[own] for name in PHASES)


def plain_copy(model: nn.Module, merged: bool = False) -> nn.Module:
    """A copy of an adapted model that uses PyTorch operations alone, for ``torch.export`` and ``torch.onnx``.

    Args:
        model: An adapted model; it is not changed.
        merged: False: every adapted layer computes its base product and the adapter's three matrix products. The copy
            is as small as the adapted model, and its cores are parameters with the same names. True: the layers are
            plain layers with weight W + dW, as after :func:`merge` and :func:`remove`.

    Returns:
        The copy, on the same device.

    Raises:
        ValueError: The model is not adapted, or a merged weight would not be finite.
    """
    exported = copy.deepcopy(model)
    if merged:
        return remove(merge(exported))
    layers = [layer for _, layer in adapted_layers(exported)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not adapted; call inject(model) first")
    for layer in layers:
        layer.unmerge()
        if not isinstance(layer.stack, ExportedStack):
            ExportedStack.become(layer.stack)
    return exported
