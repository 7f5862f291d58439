"""What a step costs by count: FLOPs of its products, and the fewest bytes that it has to move."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .memory import Passed, owned
from .variants import Problem

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# Attention as PyTorch fuses it on a CPU, which its counter does not know.
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(problem: Problem) -> int:
    """FLOPs of the products of one step (2abc for (a, b)(b, c)); counted on the form before torch.compile."""
    plain = Problem(problem.variant, problem.case, problem.network, problem.plain, problem.plain)
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        plain.step()
    return counter.get_total_flops()


def fewest_bytes(problem: Problem, passed: Passed) -> int:
    """Bytes that a step moves if everything between its ends is fused.

    Each pass reads the parameters and factors; the forward pass reads the inputs and writes the outputs; what is saved
    for the backward pass is written once (inputs are there already) and read once; the backward pass reads the
    outputs' gradients and writes those of the inputs and of what trains.
    """
    run = problem.network.runs[0]
    inputs = {x.untyped_storage().data_ptr(): x.nbytes for x in run.inputs}
    frozen = sum(owned(problem.plain).values())
    moved = frozen + sum(inputs.values()) + passed.outputs
    if problem.case.mode == "training":
        written = sum(size for address, size in passed.saved.items() if address not in inputs)
        gradients = sum(g.nbytes for g in run.gradients or ()) + sum(w.nbytes for w in problem.wanted(run.inputs))
        moved += frozen + written + sum(passed.saved.values()) + gradients
    return moved
