"""Adapters without effect: layers that the model never calls, and cores that never got a gradient."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import whole

from .structure import Adapted, TCURStacks, adapted_layers, stacks

ADVICE = "if their parents read the weight themselves, the adapters have no effect: leave them out by exclude_modules"
SAMPLE = 64


class Layer(Protocol):
    """An adapted layer, of :func:`inject` or of PEFT."""

    uncalled: bool


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
    warn_uncalled(dict(adapted_layers(model)), container.called, stacklevel=4)


def warn_without_effect(adapted: Adapted) -> None:
    """Warn of layers that were never called and of cores that are still zero, where others were called or trained."""
    container, layers = adapted.container, dict(adapted_layers(adapted.model))
    if not container.from_file:  # whoever loads an adapter may well use a part of the model alone
        warn_uncalled(layers, container.called, stacklevel=4)
    trained = {name: stack.core for name, stack in stacks(adapted.model).items() if stack.core.requires_grad}
    warn_zero(trained, lambda: _changed_beside(adapted) if was_run(layers, container.called) else None, stacklevel=4)


def warn_uncalled(layers: Mapping[str, Layer], called: bool, stacklevel: int) -> None:
    """Warn of the layers that were never called.

    Args:
        layers: The adapted layers by name.
        called: Whether the model has been called. Where that is not known, a call of some of the layers shows it.
        stacklevel: As for ``warnings.warn``, 2 for the caller.
    """
    uncalled = [name for name, layer in layers.items() if layer.uncalled]
    if not _compiled() and uncalled and (called or len(uncalled) < len(layers)):
        warnings.warn(
            f"{', '.join(uncalled[:4])} ({len(uncalled)} of {len(layers)} adapted layers) were never called; {ADVICE}",
            stacklevel=stacklevel,
        )


def warn_zero(cores: Mapping[str, Tensor], changed_beside: Callable[[], str | None], stacklevel: int) -> None:
    """Warn of cores that are zero, as they were at the start, where another core or a parameter beside them trained.

    Args:
        cores: The cores that train, by the names of their stacks.
        changed_beside: Called where all cores are zero: the name of a parameter beside them that has trained, or None.
        stacklevel: As for ``warnings.warn``, 2 for the caller.
    """
    zero = [name for name, core in cores.items() if not bool(core.detach().any())]
    beside = changed_beside() if zero and len(zero) == len(cores) else None
    if beside is None and len(zero) in (0, len(cores)):
        return
    other = "" if beside is None else f", while {beside} has changed"
    warnings.warn(
        f"the cores of {', '.join(zero[:4])} ({len(zero)} of {len(cores)} stacks) are still zero{other}: they got no "
        "gradient or are not in the optimizer",
        stacklevel=stacklevel,
    )


def was_run(layers: Mapping[str, Layer], called: bool) -> bool:
    """Whether the model has been called, or may have been within what was compiled."""
    return called or _compiled() or any(not layer.uncalled for layer in layers.values())


def sample(parameter: Tensor) -> Tensor:
    """64 to 127 values of a parameter, evenly spaced, or all of a smaller one: (n,) on the CPU, to compare with later.

    An optimizer such as AdamW moves every value. Values sampled on another device are the same, unlike sums, and cost
    nothing to keep. A parameter on the meta device has none.
    """
    if parameter.is_meta:
        return torch.empty(0)
    values = whole(parameter.detach()).flatten()
    return values[:: max(1, values.numel() // SAMPLE)].to("cpu", copy=True)


def has_changed(before: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter has other values than a :func:`sample` of it, apart from a cast of all to another dtype."""
    now = sample(parameter)
    return now.shape == before.shape and not torch.equal(before.to(now.dtype), now)


def _changed_beside(adapted: Adapted) -> str | None:
    """A parameter that has changed since :func:`unfreeze` made it train; None where none is known to have.

    Only values tell: a hook on gradients would cost each step, and trainers clear the gradients before they save. Two
    cases stay. A parameter that trains by ``requires_grad_()`` alone has no sample, and is not named. A head whose
    values are set by hand after unfreeze, in a model that is called and then saved with zero cores, is named although
    nothing trained; the warning's "has changed" and "still zero" hold there too.
    """
    parameters = dict(adapted.model.named_parameters())
    samples = adapted.container.unfrozen.items()
    return next((name for name, was in samples if name in parameters and has_changed(was, parameters[name])), None)


def _compiled() -> bool:
    """Whether Dynamo has compiled anything in this process: calls within what it compiled leave no mark."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])
