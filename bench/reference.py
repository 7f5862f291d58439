"""The check before a measurement: a variant whose outputs or gradients are wrong is not timed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .cases import Case
from .networks import Run
from .variants import Problem

# Largest allowed ||found - exact|| / ||exact|| for a layer: a few roundings of the dtype in sums of up to 14,336 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# In a network errors accumulate from layer to layer: so many times as much is allowed (UNETR's encoder showed 3 times).
NETWORK = 5
# Allowed in UNETR's step, in float32: where a leaky ReLU of its decoder sees a value near 0, roundings change gradients
# by much (LoRA of rank q: 2.4e-3).
CONVOLUTIONS = 1e-2


class Reference:
    """Exact outputs and gradients of each family of variants: every adapted layer as x (W + dW)^T + b in float64.

    A network with convolutions is compared in float32 with its reference in float32: PyTorch's convolutions in float64
    are slow, and in 16 bits rounding changes the sign before so many leaky ReLUs that gradients of any variant differ
    by a tenth.
    """

    def __init__(self) -> None:
        self._families: dict[str, list[Tensor]] = {}

    def check(self, problem: Problem) -> float:
        """The largest relative error ||found - exact|| / ||exact|| of an output or gradient.

        Raises RuntimeError with the case, the variant, the tensor and its error where that is larger than allowed.
        """
        convolutions = any(isinstance(layer, nn.Conv3d) for layer in problem.adapted.modules())
        if convolutions:
            problem = _in_dtype(problem, torch.float32)
        family = problem.variant.family
        if family not in self._families:
            exact = _in_dtype(problem, torch.float32 if convolutions else torch.float64)
            self._families[family] = _results(_with_dense(exact))
            # A replaced forward() and its layer refer to each other: without a collection they stay allocated, 5 GB of
            # Llama's block in float64.
            del exact
            gc.collect()
        worst, limit = 0.0, CONVOLUTIONS if convolutions else tolerance(problem.case)
        found = _results(problem)
        for name, value, right in zip(_names(problem), found, self._families[family], strict=True):
            error = float((value.to(right.dtype) - right).norm() / right.norm())
            if not error <= limit:
                raise RuntimeError(
                    f"{problem.case.id}, {problem.variant.name}: {name} is off by {error:.1e} of its norm, expected at "
                    f"most {limit:.0e}; not timed"
                )
            worst = max(worst, error)
        return worst


def tolerance(case: Case) -> float:
    """The largest relative error that is allowed in a case without convolutions."""
    return TOLERANCE[getattr(torch, case.dtype)] * (1 if case.network in ("layer", "stack") else NETWORK)


def _names(problem: Problem) -> Iterator[str]:
    """The names of the tensors that :func:`_results` returns, in its order."""
    run = problem.network.runs[0]
    outputs = len(run.gradients) if run.gradients else 1
    yield from (f"output {index}" for index in range(outputs))
    if problem.case.mode == "training":
        yield from (f"the gradient of input {i}" for i, x in enumerate(run.inputs) if x.requires_grad)
        yield from (f"the gradient of {name}" for name, p in problem.adapted.named_parameters() if p.requires_grad)


def _results(problem: Problem) -> list[Tensor]:
    """The outputs of the first run, then in training the gradients of its inputs and of the trained parameters."""
    run = problem.network.runs[0]
    outputs = problem.outputs(run.inputs)
    results = [y.detach() for y in outputs]
    if problem.case.mode == "training":
        results += torch.autograd.grad(outputs, problem.leaves(run.inputs), run.gradients)
    return results


def _in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem in another dtype, with its first run alone and without torch.compile."""
    module = copy.deepcopy(problem.adapted).to(dtype)
    run = problem.network.runs[0]
    inputs = tuple(x.detach().to(dtype).requires_grad_(x.requires_grad) for x in run.inputs)
    gradients = None if run.gradients is None else tuple(g.to(dtype) for g in run.gradients)
    network = replace(problem.network, runs=[Run(inputs, gradients)])
    return Problem(problem.variant, problem.case, network, module, module)


def _with_dense(problem: Problem) -> Problem:
    """The problem with W + dW built densely in every adapted layer."""
    for layer in list(problem.adapted.modules()):
        delta = delta_of(layer)
        if delta is not None:
            layer.forward = _dense_forward(layer, delta)
    return problem


def delta_of(layer: Any) -> Callable[[], Tensor] | None:
    """A function that returns an adapted layer's dW (out, in), differentiable; None for modules without one."""
    if "default" in getattr(layer, "lora_A", {}):
        # By definition: autograd does not record PEFT's own get_delta_weight.
        # The matrix of a convolution, as its rows are kernels.
        left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        return lambda: layer.scaling["default"] * left.flatten(1) @ right.flatten(1)
    return getattr(layer, "delta_weight", None)


def _dense_forward(layer: Any, delta: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """x (W + dW)^T + b, where W and b are the adapted layer's own or those of the layer that it wraps."""
    wrapped = (getattr(layer, name, None) for name in ("base", "layer", "base_layer"))
    frozen: Any = next((module for module in wrapped if isinstance(module, nn.Module)), layer)
    if isinstance(frozen, nn.Conv3d):
        return lambda x: frozen._conv_forward(x, frozen.weight + delta().view_as(frozen.weight), frozen.bias)
    return lambda x: linear(x, frozen.weight + delta(), frozen.bias)
