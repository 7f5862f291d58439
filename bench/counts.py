"""What a step costs by count: FLOPs of its products, and the fewest bytes that it has to move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from .memory import owned
from .variants import Problem

# Attention as PyTorch fuses it on a CPU, which its counter does not know.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def flops(problem: Problem) -> int:
    """FLOPs of the products of one step (2abc for (a, b)(b, c)); counted on the form before torch.compile."""
    plain = Problem(problem.variant, problem.case, problem.network, problem.plain, problem.plain)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        plain.step()
    return counter.get_total_flops()


def fewest_bytes(problem: Problem, saved: Mapping[int, int]) -> int:
    """Bytes that a step moves if everything between its ends is fused.

    Each pass reads the parameters and factors; the forward pass reads the inputs and writes the outputs; what is saved
    for the backward pass is written once (inputs are there already) and read once; the backward pass reads the
    outputs' gradients and writes those of the inputs and of what trains. ``saved`` is what
    :func:`~.memory.saved_tensors` found.
    """
    run = problem.network.runs[0]
    inputs = {x.untyped_storage().data_ptr(): x.nbytes for x in run.inputs}
    outputs = sum(y.nbytes for y in problem.outputs(run.inputs))
    moved = sum(owned(problem.plain).values()) + sum(inputs.values()) + outputs
    if problem.case.mode == "training":
        written = sum(size for address, size in saved.items() if address not in inputs)
        gradients = sum(g.nbytes for g in run.gradients or ()) + sum(w.nbytes for w in problem.wanted(run.inputs))
        moved += sum(owned(problem.plain).values()) + written + sum(saved.values()) + gradients
    return moved
