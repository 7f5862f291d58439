"""What is written while a model trains, and read again when its training is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.records import write_csv
from tcurlora_ext.io.tensors import read_checkpoint, write_checkpoint

from .additions import StepAddition
from .plan import Best, Plan, Progress, schedule
from .precision import Precision

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    progress: Progress,
    plan: Plan,
    addition: StepAddition | None = None,
) -> None:
    """Write metrics.csv, with a row for each step and one for the Dice before the first, and the checkpoint."""
    dice, chosen = ({int(step): value for step, value in curve} for curve in (progress.curve, progress.select_curve))
    measured = [("", ""), *((loss, plan.lr * schedule(plan, step)) for step, loss in enumerate(progress.losses))]
    rows = [
        {"step": step, "loss": loss, "lr": lr, "val_dice": dice.get(step, "")}
        | ({"select_dice": chosen.get(step, "")} if chosen else {})
        for step, (loss, lr) in enumerate(measured)
        if step or step in dice
    ]
    write_csv(folder / METRICS, rows)
    write_checkpoint(folder / CHECKPOINT, {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(), "step": progress.step, "losses": progress.losses,
        "curve": progress.curve, "seconds": progress.seconds, "times": progress.times,
        "selection": _selection(progress),
        "scaler": None if precision.scaler is None else precision.scaler.state_dict(),
        **({} if addition is None else {"addition": addition.state()}),
    })  # fmt: skip


def _selection(progress: Progress) -> dict[str, Any]:
    best = progress.best
    return {
        "curve": progress.select_curve, "stale": progress.stale, "stopped": progress.stopped,
        "best": None if best is None else {"step": best.step, "dice": best.dice, "parameters": dict(best.parameters)},
    }  # fmt: skip


def resume(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, precision: Precision,
    addition: StepAddition | None = None,
) -> Progress:  # fmt: skip
    """Load a checkpoint into the parameters and the optimizer; without one, Progress of no steps."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return Progress()
    content = read_checkpoint(path)
    saved = content["parameters"]
    if set(saved) != set(parameters):
        other = sorted(set(saved) ^ set(parameters))
        raise ValueError(f"{path}: holds other parameters than the model trains ({', '.join(other[:4])} differ)")
    copy_into(parameters, saved)
    optimizer.load_state_dict(content["optimizer"])
    progress = Progress(content["step"], content["losses"], content["curve"], content["seconds"])
    progress.times = content.get("times", [])  # as earlier checkpoints have none
    if selection := content.get("selection"):  # earlier checkpoints have none
        progress.select_curve, progress.stale = selection["curve"], selection["stale"]
        progress.stopped = selection["stopped"]
        progress.best = None if selection["best"] is None else Best(**selection["best"])
    if addition is not None:
        addition.load(content["addition"])
    if precision.scaler is not None and content.get("scaler"):
        precision.scaler.load_state_dict(content["scaler"])
    return progress


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters the values of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
