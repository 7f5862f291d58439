"""HyPS (Cheng et al. 2024, arXiv 2409.00884): a parallel branch from each weight's SVD and a serial bottleneck.

    y = W_residual x + B A x + bias,   B A = U_r S_r V_r^T, the principal part of W
    output = y + up(ReLU(down(y)))

Trained: B = U S^1/2 (out, r), A = S^1/2 V^T (r, in), and the bottleneck. The output starts as that of the base, up to
the rounding of W_residual + B A.

The released code (github.com/WangangCheng/HyPS, read in November 2026) differs in three ways:

- Its principal part is one whole matrix (out, in), which its choice of trained parameters leaves out. Here it is in two
  factors of rank r, which train.
- Its ReLU is on the weight of `up`, which begins at zero, where the ReLU has no gradient: the serial branch stays zero.
  Here it is on the activations, and `up` has a gradient from the first step on, `down` from the second.
- Its bottleneck has no biases and is divided by its width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.networks import NetworkSpec, target_layers

from .base import Method, MethodOptions, Task, load_trained, saves_as
from .wrapping import Bottleneck, Wrapped, leading_vectors, linear, wrap


class ParallelSerial(Wrapped):
    """A linear layer with a parallel branch B A and, on the sum, a serial bottleneck: (..., in) to (..., out).

    Args:
        base_layer: The layer; its weight becomes the residual where `split` is True.
        rank: Of B A.
        width: Of the bottleneck.
        split: Whether B A is the principal part of the weight; else A is random and B zero.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, width: int, split: bool) -> None:
        super().__init__(base_layer)
        weight = base_layer.weight
        if split:
            left, values, right = leading_vectors(weight, rank)
            self.parallel_out = nn.Parameter(left * values.sqrt())
            self.parallel_in = nn.Parameter(values.sqrt()[:, None] * right.T)
            with torch.no_grad():
                weight -= self.parallel_out @ self.parallel_in
        else:
            self.parallel_out = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
            self.parallel_in = nn.Parameter(nn.Linear(weight.shape[1], rank, bias=False).weight.detach().to(weight))
        self.serial = Bottleneck(base_layer.out_features, width, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output of the layer."""
        parallel = nn.functional.linear(nn.functional.linear(x, self.parallel_in), self.parallel_out)
        y: Tensor = self.base_layer(x) + parallel
        return y + self.serial(y)


def prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, method: Method, split: bool) -> None:
    """Put both branches into the layers that tCUR adapts."""
    rank, width = method.option(options, "rank"), method.option(options, "width")
    wrap(
        model, target_layers(model),
        lambda name, layer: ParallelSerial(linear(name, layer, rank), rank, width, split), spec, options,
    )  # fmt: skip


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prepare(model, spec, options, METHOD, split=True)


# Not chosen by measurement: the authors' released code has 5e-4; this is that of full fine-tuning here.
METHOD = Method(
    "hyps", "HyPS: principal parts and serial bottlenecks", _prepare, 1e-3, saves_as("hyps"), load_trained, "#3f00ff",
    adapter=True, options={"rank": 8, "width": 8},
)  # fmt: skip
