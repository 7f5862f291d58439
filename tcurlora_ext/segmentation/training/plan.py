"""How a model is trained, and how far that has come."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# Added to a run's seed for the windows of a warm-up: seeds of runs are small.
WARM_UP_SEEDS = 1_000_003


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Windows of one forward pass.
        lr: Peak learning rate.
        seed: Of everything random.
        roi: Size of a window in voxels.
        weight_decay: Of AdamW.
        checkpoint_every: Steps between checkpoints.
        eval_every: Steps between points of the validation curve; 0 for one before the first and one after the last.
        beside: Name prefixes of parameters that train beside an adapter.
        beside_lr: Their peak learning rate, in place of `lr`.
        amp: Autocast of the forward pass: "off", "bf16" or "fp16".
        augment: Which augmentation the windows get: "none", "intensity" or "full".
        flips: Whether they are also flipped along each axis with probability 0.5.
        class_weights: Of the loss, one for each class with the background first; empty for equal weights.
        accumulate: Forward passes of `batch` windows each whose mean gradient an optimizer step takes.
        workers: Processes that draw windows ahead; 0: none. They make no difference to the result.
        select: Which parameters the model has in the end: those of the "last" step, or of the "best" score of `select`
            in :func:`train`.
        patience: Stop after so many scores in a row without a better one; 0: never.
        select_every: Steps between these scores; 0 for one after the last step.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    roi: tuple[int, int, int]
    weight_decay: float = 0.0
    checkpoint_every: int = 50
    eval_every: int = 0
    beside: tuple[str, ...] = ()
    beside_lr: float = 0.0
    amp: str = "off"
    augment: str = "full"
    flips: bool = False
    class_weights: tuple[float, ...] = ()
    accumulate: int = 1
    workers: int = 0
    select: str = "last"
    patience: int = 0
    select_every: int = 0


@dataclass
class Best:
    """The parameters of the best score so far.

    Attributes:
        step: Steps done when it was taken.
        dice: The score.
        parameters: Copies, by name.
    """

    step: int
    dice: float
    parameters: Mapping[str, Tensor]


@dataclass
class Progress:
    """What has been trained so far.

    Attributes:
        step: Steps done.
        losses: One per step.
        curve: Pairs of a step and the validation Dice after it.
        seconds: Time in the steps alone, without validation and checkpoints.
        select_curve: Pairs of a step and the score after it that `select` and `patience` of the plan go by.
        best: The best of them; None before the first that is a number.
        stale: How many scores in a row were not better.
        times: Seconds of each step's passes and update, without drawing its windows; steps of an earlier version have
            none.
        stopped: Whether `patience` has ended the training before its last step.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    select_curve: list[list[float]] = field(default_factory=list)
    best: Best | None = None
    stale: int = 0
    stopped: bool = False
    times: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        """The median of `times` in milliseconds without the first three steps, which warm up; NaN without any."""
        times = self.times[3:] or self.times
        return 1e3 * statistics.median(times) if times else math.nan

    def scored(self, dice: float, parameters: Mapping[str, Tensor], patience: int) -> None:
        """Take in a score after the current step; NaN is no better than any other."""
        self.select_curve.append([float(self.step), dice])
        if not math.isnan(dice) and (self.best is None or dice > self.best.dice):
            copies = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
            self.best, self.stale = Best(self.step, dice, copies), 0
        else:
            self.stale += 1
        self.stopped = bool(patience) and self.stale >= patience


def schedule(plan: Plan, step: int) -> float:
    """The factor on the peak learning rate of a plan."""
    return rise_and_cosine(step, plan.steps)


def rise_and_cosine(step: int, steps: int) -> float:
    """A factor on the learning rate: a linear rise over the first 5 % of the steps, then a half cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
