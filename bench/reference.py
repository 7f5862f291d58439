"""The check before a measurement: a form that computes something else is not timed."""

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

# Of ||found - exact|| / ||exact||, for one layer: a few roundings of the dtype, and of sums over up to 14,336 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Of a whole network, whose layers pass their roundings on; 13 layers of UNETR's encoder showed up to 3 times.
NETWORK = 5
# Of UNETR's step in float32, gradients behind its decoder's leaky ReLUs; LoRA of rank q was off by 2.4e-3.
CONVOLUTIONS = 1e-2


class Reference:
    """Exact outputs and gradients by family of variants: every adapted layer as x (W + dW)^T + b in float64.

    A network with convolutions is checked in float32 on both sides: PyTorch's convolutions in float64 are slow, and in
    16 bits so many of its leaky ReLUs take the other side of 0 that gradients differ by a tenth whatever the form.
    """

    def __init__(self) -> None:
        self._families: dict[str, list[Tensor]] = {}

    def check(self, problem: Problem) -> float:
        """The largest error of an output or gradient relative to its norm. RuntimeError where it is too large."""
        convolutions = any(isinstance(layer, nn.Conv3d) for layer in problem.plain.modules())
        if convolutions:
            problem = _in_dtype(problem, torch.float32)
        family = problem.variant.family
        if family not in self._families:
            exact = _in_dtype(problem, torch.float32 if convolutions else torch.float64)
            self._families[family] = _results(_with_dense(exact))
            # A replaced forward() holds its layer, which holds it: 5 GB of Llama's block in float64 would stay.
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
    """What is allowed for a network without convolutions."""
    return TOLERANCE[getattr(torch, case.dtype)] * (1 if case.network in ("layer", "stack") else NETWORK)


def _names(problem: Problem) -> Iterator[str]:
    """Names of what :func:`_results` returns, in its order."""
    run = problem.network.runs[0]
    outputs = len(run.gradients) if run.gradients else 1
    yield from (f"output {index}" for index in range(outputs))
    if problem.case.mode == "training":
        yield from (f"the gradient of input {i}" for i, x in enumerate(run.inputs) if x.requires_grad)
        yield from (f"the gradient of {name}" for name, p in problem.plain.named_parameters() if p.requires_grad)


def _results(problem: Problem) -> list[Tensor]:
    """Outputs of the first run, then in training the gradients of its inputs and of what trains."""
    run = problem.network.runs[0]
    outputs = problem.outputs(run.inputs)
    results = [y.detach() for y in outputs]
    if problem.case.mode == "training":
        results += torch.autograd.grad(outputs, problem.wanted(run.inputs), run.gradients)
    return results


def _in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem before torch.compile with one run, in another dtype."""
    module = copy.deepcopy(problem.plain).to(dtype)
    run = problem.network.runs[0]
    inputs = tuple(x.detach().to(dtype).requires_grad_(x.requires_grad) for x in run.inputs)
    gradients = None if run.gradients is None else tuple(g.to(dtype) for g in run.gradients)
    network = replace(problem.network, runs=[Run(inputs, gradients)])
    return Problem(problem.variant, problem.case, network, module, module)


def _with_dense(problem: Problem) -> Problem:
    """The problem with a dense dW in every adapted layer."""
    for layer in list(problem.plain.modules()):
        delta = delta_of(layer)
        if delta is not None:
            layer.forward = _dense_forward(layer, delta)
    return problem


def delta_of(layer: Any) -> Callable[[], Tensor] | None:
    """What makes the dense change (out, in) of an adapted layer, differentiable; None for other modules."""
    if "default" in getattr(layer, "lora_A", {}):
        # By definition: PEFT's get_delta_weight gives a tensor without history.
        return lambda: layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return getattr(layer, "delta_weight", None)


def _dense_forward(layer: Any, delta: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """x (W + dW)^T + b for an adapted layer, or for a form that wraps the layer that has W and b."""
    wrapped = (getattr(layer, name, None) for name in ("base", "layer", "base_layer"))
    frozen: Any = next((module for module in wrapped if isinstance(module, nn.Module)), layer)
    return lambda x: linear(x, frozen.weight + delta(), frozen.bias)
