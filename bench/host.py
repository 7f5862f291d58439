"""The host's time for a call: a forward pass that autograd records, of a layer whose arithmetic takes no time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tcurlora_ext.adapter.layer.linear import TCURLinear

from .cases import TINY, of_layer
from .devices import repeat, timed
from .networks import build
from .reference import Reference
from .run import Row, number
from .variants import Problem, prepare, variants

CALLS = 500


def host_times(device: torch.device, rounds: int) -> list[Row]:
    """One row per variant: median and least time of a call in us, on one thread, by interleaved rounds of 500 calls.

    For each backend there is a second row for the registered operator, called without the module around it.
    """
    case = of_layer(TINY, 4, rank=2, compiled=False)
    network, reference = build(case, device), Reference()
    calls: dict[str, Callable[[], Any]] = {}
    for variant in variants(device):
        if variant.fits(case, network):
            problem = prepare(variant, case, network)
            reference.check(problem)
            calls[variant.name] = partial(problem.adapted.get_submodule("linear0"), network.runs[0].inputs[0])
            if variant.backend:
                calls[f"{variant.name}, operator"] = operator_call(problem)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):  # the first warms up
            for name, call in calls.items():
                taken[name].append(1e6 / CALLS * timed(partial(repeat, call, CALLS), device)[1])
    finally:
        torch.set_num_threads(threads)
    return [
        {"variant": name, "median_us": number(statistics.median(times[1:])), "least_us": number(min(times[1:]))}
        for name, times in taken.items()
    ]


def operator_call(problem: Problem) -> Callable[[], Any]:
    """``torch.ops.tcurlora.linear`` with the arguments that the layer gives it."""
    layer = problem.adapted.get_submodule("linear0")
    assert isinstance(layer, TCURLinear)
    stack, x = layer.stack, problem.network.runs[0].inputs[0]
    tensors = (x, layer.weight, layer.bias, stack.col, stack.core_fourier(), stack.row)
    rest = (layer.first_slice, layer.num_slices, stack.scale, stack.options.transform, problem.variant.backend)
    return partial(torch.ops.tcurlora.linear.default, *tensors, *rest)
