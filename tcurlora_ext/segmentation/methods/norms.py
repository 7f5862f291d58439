"""The affine parameters of the normalisation layers, with the head."""

from __future__ import annotations

from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix

from .base import Method, MethodOptions, Task, beside, load_trained, saves_as

# Every block of MONAI's transformers has this norm; without cross-attention its forward pass does not use it.
UNUSED = "norm_cross_attn"


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    prefixes = beside(spec, options)
    affine = affine_of_norms(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in affine or has_prefix(name, prefixes))


def affine_of_norms(model: nn.Module) -> set[str]:
    """Names of the affine parameters of all normalisation layers that a forward pass uses."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and not name.endswith(UNUSED)
        for parameter, _ in module.named_parameters(recurse=False)
    }


METHOD = Method(
    "norms", "affine parameters of norms", _prepare, 1e-2, saves_as("norms"), load_trained, "#56b4e9", adapter=True
)  # fmt: skip
