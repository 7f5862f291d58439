"""What the methods that PEFT computes have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix, target_layers
from tcurlora_ext.segmentation.packages import require_package

from .base import Method, MethodOptions, Prepare, Task, beside, load_trained, saves_as
from .wrapping import linear, place

# From a method's options and the names of the layers to PEFT's configuration; PEFT is imported inside.
Configure = Callable[[Method, MethodOptions, list[str]], Any]


def inject(model: nn.Module, spec: NetworkSpec, options: MethodOptions, config: Any) -> Any:
    """Adapt a model by PEFT in place; the head or decoder trains beside the adapter.

    Random weights follow from the options' seed; the global random state of PyTorch is left as it was.

    Returns:
        PEFT's object for the adapted model, which :mod:`.adalora` steps.
    """
    require_package("peft")
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    prefixes = beside(spec, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name="default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or has_prefix(name, prefixes))
    return tuner


def layers_of(
    model: nn.Module, spec: NetworkSpec, options: MethodOptions, convolutions: bool = False
) -> list[str]:  # fmt: skip
    """Names of the layers that tCUR adapts by default and that do not train whole beside it.

    Args:
        model: The network.
        spec: Which parameters are the head and the decoder.
        options: What trains beside the adapter.
        convolutions: Whether the method adapts convolutions; transposed ones, which PEFT never adapts, are left out.

    Raises:
        ValueError: A layer is a convolution, and the method adapts none; the message names the first.
    """
    names = target_layers(model, beside(spec, options))
    if convolutions:
        return [name for name in names if not getattr(model.get_submodule(name), "transposed", False)]
    for name in names:
        linear(name, model.get_submodule(name))
    return names


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold PEFT's adapters into the weights and put the plain layers back in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        place(model, name, layer.get_base_layer())


def method_of(
    name: str, description: str, lr: float, colour: str, configure: Configure, options: dict[str, Any],
    convolutions: bool = False,
) -> Method:  # fmt: skip
    """A method that is a configuration of PEFT, in the layers that tCUR adapts by default.

    Args:
        name, description, lr, colour, options: Of the method.
        configure: Gives the configuration.
        convolutions: Whether PEFT has it for convolutions too.
    """

    def prepare(model: nn.Module, spec: NetworkSpec, given: MethodOptions, task: Task | None = None) -> None:
        require_package("peft")
        inject(model, spec, given, configure(method, given, layers_of(model, spec, given, convolutions)))

    chosen: Prepare = prepare
    method = Method(
        name, description, chosen, lr, saves_as(name), load_trained, colour, adapter=True, options=options, merge=merge
    )  # fmt: skip
    return method
