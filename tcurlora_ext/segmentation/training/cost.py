"""What a training step costs: its memory and its time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from tcurlora_ext.saved import saved_for_backward
from tcurlora_ext.segmentation.dataset import Volume

from .additions import addition_of
from .loop import make_optimizer, take, trainable
from .plan import Plan
from .precision import Precision, segmentation_loss
from .sampling import Sampler

MIB = 2**20


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step beyond the weights.

    Attributes:
        kept: What the forward pass of one batch saves for the backward pass, parameters and buffers aside.
        gradients: Of the trained parameters.
        optimizer: AdamW's two moments of them.
        peak: On a GPU, the most that PyTorch had allocated during a step, the weights included; None elsewhere.
    """

    kept: int
    gradients: int
    optimizer: int
    peak: int | None

    @property
    def counted_mib(self) -> float:
        """Kept for the backward pass, gradients and moments, in MiB."""
        return (self.kept + self.gradients + self.optimizer) / MIB

    @property
    def peak_mib(self) -> float | None:
        """`peak` in MiB."""
        return None if self.peak is None else self.peak / MIB


def step_memory(model: nn.Module, volumes: Sequence[Volume], plan: Plan) -> StepMemory:
    """Measure a step on the windows of the plan's first one; random states are restored.

    Args:
        model: On its device; on a GPU its trained parameters change.
        volumes: The training cases.
        plan: How it is trained.
    """
    parameters, one = trainable(model), replace(plan, accumulate=1)
    device = next(iter(parameters.values())).device
    images, labels = (tensor.to(device) for tensor in Sampler(volumes, one)(0))
    loss_of, precision = segmentation_loss(plan.class_weights).to(device), Precision(plan.amp, device)
    with torch.random.fork_rng():
        model.train()
        with saved_for_backward(model) as saved:
            loss = precision.loss(model, loss_of, images, labels)
        kept, peak = sum(saved.values()), None
        del loss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            take(model, loss_of, images, labels, make_optimizer(parameters, plan), precision, one, None)
            peak = torch.cuda.max_memory_allocated(device)
    model.zero_grad(set_to_none=True)
    trained = sum(p.numel() * p.element_size() for p in parameters.values())
    return StepMemory(kept, trained, 2 * trained, peak)


def step_times(model: nn.Module, volumes: Sequence[Volume], plan: Plan, count: int, untimed: int) -> list[float]:
    """Seconds of training steps, without drawing their windows; random states are restored.

    Args:
        model: Trained in place, on its device.
        volumes: The training cases.
        plan: How it is trained; all steps take the windows of its first one.
        count: How many steps are timed.
        untimed: How many come before them.
    """
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    optimizer, precision = make_optimizer(parameters, plan), Precision(plan.amp, device)
    images, labels = Sampler(volumes, plan)(0)
    loss_of, times = segmentation_loss(plan.class_weights).to(device), []
    with torch.random.fork_rng():
        model.train()
        for _ in range(untimed + count):
            started = time.perf_counter()
            # which waits for the loss: on a GPU too, the time is that of the passes
            take(model, loss_of, images, labels, optimizer, precision, plan, addition_of(model))
            times.append(time.perf_counter() - started)
    return times[untimed:]
