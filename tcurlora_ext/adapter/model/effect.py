"""Adapters without effect: layers that the model never calls, and cores that never got a gradient."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from .structure import Adapted, TCURStacks, adapted_layers, stacks

ADVICE = "if their parents read the weight themselves, the adapters have no effect: leave them out by exclude_modules"


def watch_first_call(model: nn.Module, container: TCURStacks) -> None:
    """Warn after the first call of a model in which no adapted layer was called. Later calls cost nothing."""
    container.first_call = model.register_forward_hook(_after_first_call)


def _after_first_call(model: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    container = next((module for module in model.modules() if isinstance(module, TCURStacks)), None)
    if container is None or container.first_call is None:
        return
    container.first_call.remove()
    container.first_call = None
    container.called = True
    _warn_uncalled(model, container, stacklevel=4)


def warn_without_effect(adapted: Adapted) -> None:
    """Warn of layers that were never called and of cores that are still zero, where others were called or trained."""
    if not adapted.container.from_file:  # whoever loads an adapter may well use a part of the model alone
        _warn_uncalled(adapted.model, adapted.container, stacklevel=4)
    trained = {name: stack for name, stack in stacks(adapted.model).items() if stack.core.requires_grad}
    zero = [name for name, stack in trained.items() if not bool(stack.core.detach().any())]
    if zero and len(zero) < len(trained):
        warnings.warn(
            f"the cores of {', '.join(zero[:4])} ({len(zero)} of {len(trained)} stacks) are still zero: they got no "
            "gradient or are not in the optimizer",
            stacklevel=3,
        )


def _warn_uncalled(model: nn.Module, container: TCURStacks, stacklevel: int) -> None:
    layers = dict(adapted_layers(model))
    uncalled = [name for name, layer in layers.items() if layer.uncalled]
    if not _compiled() and uncalled and (container.called or len(uncalled) < len(layers)):
        warnings.warn(
            f"{', '.join(uncalled[:4])} ({len(uncalled)} of {len(layers)} adapted layers) were never called; {ADVICE}",
            stacklevel=stacklevel,
        )


def _compiled() -> bool:
    """Whether Dynamo has compiled anything in this process: calls within what it compiled leave no mark."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])
