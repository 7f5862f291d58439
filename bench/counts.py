"""What a step costs by count: FLOPs of its matrix products, and the fewest bytes that it has to move."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tcurlora_ext.saved import owned

from .memory import Passed
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
    """FLOPs of the matrix products of one step, 2abc for (a, b)(b, c); counted without torch.compile."""
    eager = Problem(problem.variant, problem.case, problem.network, problem.adapted, problem.adapted)
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        eager.step()
    return counter.get_total_flops()


def fewest_bytes(problem: Problem, passed: Passed) -> int:
    """Bytes that a step would move if the forward pass were one fused kernel, and the backward pass another.

    Each pass reads the parameters and factors. The forward pass reads the inputs and writes the outputs and what is
    saved for the backward pass, inputs aside. The backward pass reads what was saved and the gradients of the outputs,
    and writes the gradients of the inputs and of the trained parameters.
    """
    run = problem.network.runs[0]
    inputs = {x.untyped_storage().data_ptr(): x.nbytes for x in run.inputs}
    weights = sum(owned(problem.adapted).values())
    moved = weights + sum(inputs.values()) + passed.outputs
    if problem.case.mode == "training":
        written = sum(size for address, size in passed.saved.items() if address not in inputs)
        gradients = sum(g.nbytes for g in run.gradients or ()) + sum(w.nbytes for w in problem.leaves(run.inputs))
        moved += weights + written + sum(passed.saved.values()) + gradients
    return moved
