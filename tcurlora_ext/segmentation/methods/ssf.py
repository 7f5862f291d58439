"""SSF (Lian et al. 2022, arXiv 2210.08823): a factor and a shift for each feature after linear layers and norms.

They follow the layers that tCUR adapts and the layer norms of the encoder, and fold into their weights and biases.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix, target_layers

from .base import Method, MethodOptions, Task, load_trained, saves_as
from .norms import UNUSED
from .wrapping import Wrapped, linear, merge, wrap


class ScaleShift(Wrapped):
    """factor * base(x) + shift, from (..., in) to (..., out); factor and shift (out,) begin at one and zero.

    Args:
        base_layer: A linear layer or a layer norm over the last dimension.
    """

    def __init__(self, base_layer: nn.Linear | nn.LayerNorm) -> None:
        super().__init__(base_layer)
        features = base_layer.weight.shape[0]
        self.factor = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """The scaled and shifted output of the layer."""
        out: Tensor = self.base_layer(x) * self.factor + self.shift
        return out

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer with scaled weight and scaled and shifted bias, which it gets where it has none."""
        layer = deepcopy(self.base_layer)
        assert isinstance(layer, nn.Linear | nn.LayerNorm)
        layer.weight.mul_(self.factor.unsqueeze(1) if isinstance(layer, nn.Linear) else self.factor)
        bias = self.shift if layer.bias is None else layer.bias * self.factor + self.shift
        layer.bias = nn.Parameter(bias.clone())
        return layer


def _make(name: str, layer: nn.Module) -> ScaleShift:
    return ScaleShift(layer if isinstance(layer, nn.LayerNorm) else linear(name, layer))


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None and len(module.normalized_shape) == 1
        if not name.endswith(UNUSED) and not has_prefix(name, spec.decoder)
    ]
    wrap(model, [*target_layers(model), *norms], _make, spec, options)


# Not chosen by measurement: that of the norms here, which are alike.
METHOD = Method(
    "ssf", "scales and shifts of features (SSF)", _prepare, 1e-2, saves_as("ssf"), load_trained, "#80cdc1",
    adapter=True, merge=merge,
)  # fmt: skip
