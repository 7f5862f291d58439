"""Options of training that `tcurlora finetune` and `tcurlora pretrain` share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .logs import check_logs
from .plan import Plan
from .precision import check_amp
from .sampling import AUGMENT

SELECT = ("last", "best")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options that are described by --help. With the defaults, training is as it was before there were any.

    Attributes:
        amp: Autocast of the forward pass: "off", "bf16" or "fp16".
        cache: Folder for prepared volumes, which are then read one by one; None keeps all in memory.
        workers: Processes that draw windows ahead.
        augment: "none", "intensity" or "full".
        flips: Whether windows are also flipped; wrong where labels tell left from right.
        class_weights: Of the loss, background first; None for equal weights.
        accumulate: Batches whose mean gradient an optimizer step takes.
        select: "last", or "best": the parameters with the best Dice on held-out training cases.
        patience: Stop after so many scores in a row on held-out training cases without a better one; 0: never.
        select_fraction: Fraction of the training subjects that is held out where `select` or `patience` needs it.
        select_every: Steps between scores on them; None: a tenth of the steps.
        log: "tensorboard" and "mlflow" write curves there too.
    """

    amp: str = "off"
    cache: Path | None = None
    workers: int = 0
    augment: str = "full"
    flips: bool = False
    class_weights: tuple[float, ...] | None = None
    accumulate: int = 1
    select: str = "last"
    patience: int = 0
    select_fraction: float = 0.2
    select_every: int | None = None
    log: tuple[str, ...] = ()

    @property
    def holds_out(self) -> bool:
        """Whether training cases are held out."""
        return self.select == "best" or self.patience > 0


def check_options(options: TrainingOptions, device: torch.device) -> None:
    """Raise ValueError, naming the option, where one is wrong or its package is missing."""
    for name, value, known in (("augment", options.augment, AUGMENT), ("select", options.select, SELECT)):
        if value not in known:
            raise ValueError(f"{name}: found '{value}', expected one of {', '.join(known)}")
    for name, least in (("workers", 0), ("patience", 0), ("accumulate", 1), ("select_every", 1)):
        number = getattr(options, name)
        if number is not None and number < least:
            raise ValueError(f"{name.replace('_', '-')}: found {number}, expected {least} or more")
    if not 0 < options.select_fraction < 1:
        raise ValueError(f"select-fraction: found {options.select_fraction}, expected a number between 0 and 1")
    if options.flips and options.augment == "none":
        raise ValueError("flips: found them with augment none, expected intensity or full")
    if options.cache is not None:
        _check_cache(options.cache)
    _check_weights(options.class_weights)
    check_logs(options.log)
    check_amp(options.amp, device)


def _check_cache(cache: Path) -> None:
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"cache: found the file {cache}, expected a folder or nothing")
    there = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):  # MONAI would prepare each volume again, every time
        raise ValueError(f"cache: found {there}, which cannot be written to, expected a folder that can")


def _check_weights(weights: tuple[float, ...] | None) -> None:
    if weights is not None and not (all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)):
        raise ValueError(f"class-weights: found {_listed(weights)}, expected numbers from 0 that are not all 0")


def check_class_count(options: TrainingOptions, classes: int) -> None:
    """Raise ValueError unless there are as many class weights as classes, the background included."""
    if options.class_weights is not None and len(options.class_weights) != classes:
        raise ValueError(
            f"class-weights: found {_listed(options.class_weights)}, expected {classes} numbers, one for each class "
            "with the background first"
        )


def _listed(weights: tuple[float, ...]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)


def with_options(plan: Plan, options: TrainingOptions) -> Plan:
    """A plan with the options of a run."""
    changes: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("amp", "augment", "flips", "accumulate", "workers", "select", "patience")
    }
    every = options.select_every or max(1, plan.steps // 10)
    return replace(
        plan, **changes, class_weights=options.class_weights or (), select_every=every if options.holds_out else 0
    )  # fmt: skip
