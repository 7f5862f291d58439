"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): the biases of the encoder, with the head.

Biases of the decoder train with the decoder or not at all: where instance normalisation follows a convolution, its bias
cancels.
"""

from __future__ import annotations

from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix

from .base import Method, MethodOptions, Task, beside, load_trained, saves_as
from .norms import UNUSED


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prefixes = beside(spec, options)
    for name, parameter in model.named_parameters():
        bias = name.endswith(".bias") and not has_prefix(name, spec.decoder) and UNUSED not in name
        parameter.requires_grad_(bias or has_prefix(name, prefixes))


# Not chosen by measurement: that of the norms here, which are as few.
METHOD = Method(
    "bitfit", "biases of the encoder (BitFit)", _prepare, 1e-2, saves_as("bitfit"), load_trained, "#000000",
    adapter=True,
)  # fmt: skip
