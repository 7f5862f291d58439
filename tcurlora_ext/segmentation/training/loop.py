"""The training loop."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.dataset import Volume

from . import checkpoints
from .additions import StepAddition, addition_of
from .interruption import Interruption
from .plan import WARM_UP_SEEDS, Plan, Progress, schedule
from .precision import Precision, segmentation_loss
from .sampling import Sampler, windows


class Diverged(ValueError):
    """The loss is no longer a finite number."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; one that several layers share is listed once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: dict[str, nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """AdamW, with the peak learning rate of each parameter group kept as its "peak"."""
    groups: list[dict[str, Any]] = [{"params": [], "peak": lr} for lr in (plan.lr, plan.beside_lr)]
    for name, parameter in parameters.items():
        groups[bool(plan.beside) and name.startswith(plan.beside)]["params"].append(parameter)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, weight_decay=plan.weight_decay)


def loss_step(volumes: Sequence[Volume], plan: Plan) -> Callable[[nn.Module], Tensor]:
    """A function that draws the next windows of a plan and returns a network's loss on them, on its device.

    Its windows are not those of :func:`train` with the same plan, and everything random in it follows from the seed.
    It computes in float32, and a step is one forward pass, whatever the plan says of precision and accumulation.
    """
    own = replace(plan, seed=plan.seed + WARM_UP_SEEDS, accumulate=1)
    sampler, loss_of = Sampler(volumes, own), segmentation_loss(plan.class_weights)
    steps = itertools.count()

    def step(model: nn.Module) -> Tensor:
        at = next(steps)
        torch.manual_seed(int(np.random.default_rng([plan.seed, at, 2]).integers(2**62)))
        device = next(model.parameters()).device
        images, labels = (tensor.to(device) for tensor in sampler(at))
        model.train()
        loss: Tensor = loss_of.to(device)(model(images), labels)
        return loss

    return step


def train(
    model: nn.Module,
    volumes: Sequence[Volume],
    plan: Plan,
    folder: Path,
    *,
    validate: Callable[[nn.Module], float] | None = None,
    select: Callable[[nn.Module], float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Progress:
    """Train the parameters that require gradients, with MONAI's sum of Dice loss and cross-entropy.

    The global random state of PyTorch is restored afterwards. Ctrl-C lets the step end and writes a checkpoint before
    KeyboardInterrupt is raised; a second one raises it at once.

    Args:
        model: Trained in place, on the device it is on.
        volumes: The training cases.
        plan: How to train.
        folder: Gets `metrics.csv` (step, from 0; loss, learning rate, validation Dice) and `checkpoint.pt`. A
            checkpoint that is there already is resumed from.
        validate: Returns the validation Dice of the model; called before the first step too.
        select: Returns the score that `select` and `patience` of the plan go by, on other cases than `validate`.
        on_step: Called after each step with the number of steps done and the loss.
        log: Called after each step with the number of steps done and what was measured at it, by name, and before the
            first step with the validation Dice.

    Raises:
        Diverged: The loss is not finite.
        ValueError: The checkpoint does not fit the model.
    """
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    optimizer, precision = make_optimizer(parameters, plan), Precision(plan.amp, device)
    addition = addition_of(model)
    progress = checkpoints.resume(folder, parameters, optimizer, precision, addition)
    sampler, loss_of = Sampler(volumes, plan), segmentation_loss(plan.class_weights).to(device)
    with torch.random.fork_rng(), Interruption() as interruption:
        if validate is not None and progress.step == 0:
            progress.curve.append([0.0, validate(model)])
            if log is not None:
                log(0, {"val_dice": progress.curve[0][1]})
        drawn = windows(sampler, progress.step)
        stopping = False
        while progress.step < plan.steps and not (progress.stopped or stopping):
            step, started = progress.step, time.perf_counter()
            torch.manual_seed(int(np.random.default_rng([plan.seed, step, 1]).integers(2**62)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(plan, step)
            images, labels = next(drawn)
            model.train()
            drawn_at = time.perf_counter()
            progress.losses.append(take(model, loss_of, images, labels, optimizer, precision, plan, addition))
            progress.step = step + 1
            if addition is not None:
                addition.after_step(progress.step)
            if not math.isfinite(progress.losses[-1]):
                raise Diverged(
                    f"{folder}: the loss of step {step} is {progress.losses[-1]}, expected a finite number; "
                    f"try a learning rate below {plan.lr:g}"
                )
            ended = time.perf_counter()
            progress.seconds += ended - started
            progress.times.append(ended - drawn_at)
            measured = {"loss": progress.losses[-1], "lr": plan.lr * schedule(plan, step)}
            last = progress.step == plan.steps
            if select is not None and (last or _due(progress.step, plan.select_every)):
                measured["select_dice"] = select(model)
                progress.scored(measured["select_dice"], parameters, plan.patience)
                last = last or progress.stopped
            if validate is not None and (last or _due(progress.step, plan.eval_every)):
                measured["val_dice"] = validate(model)
                progress.curve.append([float(progress.step), measured["val_dice"]])
            stopping = interruption.asked  # Ctrl-C from here on ends the next step
            if last or stopping or _due(progress.step, plan.checkpoint_every):
                checkpoints.save(folder, parameters, optimizer, precision, progress, plan, addition)
            if on_step is not None:
                on_step(progress.step, progress.losses[-1])
            if log is not None:
                log(progress.step, measured)
        if interruption.asked:
            raise KeyboardInterrupt
    if plan.select == "best" and progress.best is not None:
        checkpoints.copy_into(parameters, progress.best.parameters)
    return progress


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def take(
    model: nn.Module, loss_of: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer,
    precision: Precision, plan: Plan, addition: StepAddition | None,
) -> float:  # fmt: skip
    """One optimizer step on the mean loss of the windows, `plan.batch` of them at a time; returns that loss.

    A penalty that a method adds has its part in the gradients, not in the loss that is returned.
    """
    optimizer.zero_grad(set_to_none=True)
    device, total = next(model.parameters()).device, 0.0
    for part in range(plan.accumulate):
        chosen = slice(part * plan.batch, (part + 1) * plan.batch)
        loss = precision.loss(model, loss_of, images[chosen].to(device), labels[chosen].to(device)) / plan.accumulate
        precision.backward(loss if addition is None else loss + addition.penalty() / plan.accumulate)
        total += loss.item()
    precision.step(optimizer)
    return total
