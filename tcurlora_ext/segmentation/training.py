"""A training loop that can be interrupted at any step and resumed with the same result, bit for bit.

Everything random in step t (the choice of cases, crops, augmentation, dropout) is drawn from the seed and t alone, and
the learning rate is a function of t. A checkpoint is therefore the trained parameters, the optimizer's state, the step
and the curves: no state of a random number generator or of a scheduler has to be saved.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcurlora_ext.io.records import write_csv
from tcurlora_ext.io.tensors import read_checkpoint, write_checkpoint
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.losses import IgnoringLoss

# Added to a run's seed for the windows of a warm-up: seeds of runs are small.
WARM_UP_SEEDS = 1_000_003


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        lr: Peak learning rate.
        seed: Of everything random.
        roi: Size of a window in voxels.
        weight_decay: Of AdamW.
        checkpoint_every: Steps between checkpoints.
        eval_every: Steps between points of the validation curve; 0 for one point after the last step.
        beside: Name prefixes of parameters that train beside an adapter.
        beside_lr: Their peak learning rate, in place of `lr`.
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


@dataclass
class Progress:
    """What has been trained so far.

    Attributes:
        step: Steps done.
        losses: One per step.
        curve: Pairs of a step and the validation Dice after it.
        seconds: Time in the steps alone, without validation and checkpoints.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; one that several layers share is listed once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def schedule(plan: Plan, step: int) -> float:
    """The factor on the peak learning rate: a linear rise over the first 5 % of the steps, then a half cosine to 0."""
    warmup = max(1, plan.steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, plan.steps - warmup)))


def make_optimizer(parameters: dict[str, nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """AdamW, with the peak learning rate of each parameter group kept as its "peak"."""
    groups: list[dict[str, Any]] = [{"params": [], "peak": lr} for lr in (plan.lr, plan.beside_lr)]
    for name, parameter in parameters.items():
        groups[bool(plan.beside) and name.startswith(plan.beside)]["params"].append(parameter)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, weight_decay=plan.weight_decay)


class Sampler:
    """Draws the windows of a step: crops of padded volumes, two of three around foreground, with augmentation.

    Augmentation is a random affine deformation and random changes of contrast, scale, offset and noise.
    """

    def __init__(self, volumes: Sequence[Volume], plan: Plan) -> None:
        from monai.transforms import (
            Compose,
            RandAdjustContrastd,
            RandAffined,
            RandCropByPosNegLabeld,
            RandGaussianNoised,
            RandScaleIntensityd,
            RandShiftIntensityd,
            SpatialPadd,
        )

        keys = ["image", "label"]
        pad = SpatialPadd(keys, plan.roi)
        self.plan = plan
        self.items = [pad({"image": _untracked(v.image), "label": _untracked(v.label)}) for v in volumes]
        self.augment = Compose([
            RandCropByPosNegLabeld(keys, "label", plan.roi, pos=2, neg=1, num_samples=1),
            RandAffined(
                keys, prob=0.7, rotate_range=(0.2,) * 3, scale_range=(0.1,) * 3, mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.8, 1.25)),
            RandScaleIntensityd("image", factors=0.2, prob=0.5),
            RandShiftIntensityd("image", offsets=0.2, prob=0.5),
            RandGaussianNoised("image", prob=0.3, std=0.1),
        ])  # fmt: skip

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch, C, *roi) and labels (batch, 1, *roi) of a step; they depend on the seed and the step alone."""
        rng = np.random.default_rng([self.plan.seed, step])
        chosen = rng.choice(len(self.items), self.plan.batch, replace=self.plan.batch > len(self.items))
        images, labels = [], []
        for index in chosen:
            self.augment.set_random_state(seed=int(rng.integers(2**31)))
            window: Any = self.augment(dict(self.items[index]))
            window = window[0] if isinstance(window, list) else window
            images.append(_untracked(window["image"]))
            labels.append(_untracked(window["label"]))
        return torch.stack(images), torch.stack(labels)


def _untracked(tensor: Tensor) -> Tensor:
    """A tensor without MONAI's record of the transforms applied to it, which would grow with every step."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def loss_step(volumes: Sequence[Volume], plan: Plan) -> Callable[[nn.Module], Tensor]:
    """A function that draws the next windows of a plan and returns a network's loss on them, on its device.

    Its windows are not those of :func:`train` with the same plan, and everything random in it follows from the seed.
    """
    sampler, loss_of = Sampler(volumes, replace(plan, seed=plan.seed + WARM_UP_SEEDS)), segmentation_loss()
    steps = itertools.count()

    def step(model: nn.Module) -> Tensor:
        at = next(steps)
        torch.manual_seed(int(np.random.default_rng([plan.seed, at, 2]).integers(2**62)))
        device = next(model.parameters()).device
        images, labels = (tensor.to(device) for tensor in sampler(at))
        model.train()
        loss: Tensor = loss_of(model(images), labels)
        return loss

    return step


def segmentation_loss() -> nn.Module:
    """Dice and cross-entropy; the Dice loss leaves the background out.

    With it, a class of 2 % of the voxels was not learnt in 500 steps. Voxels that the labels ignore do not count.
    """
    from monai.losses.dice import DiceCELoss

    return IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True, include_background=False))


def train(
    model: nn.Module,
    volumes: Sequence[Volume],
    plan: Plan,
    folder: Path,
    *,
    validate: Callable[[nn.Module], float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Progress:
    """Train the parameters that require gradients, with MONAI's sum of Dice loss and cross-entropy.

    The global random state of PyTorch is restored afterwards.

    Args:
        model: Trained in place, on the device it is on.
        volumes: The training cases.
        plan: How to train.
        folder: Gets `metrics.csv` (step, loss, learning rate, validation Dice) and `checkpoint.pt`. A checkpoint that
            is there already is resumed from.
        validate: Returns the validation Dice of the model.
        on_step: Called after each step with the number of steps done and the loss.

    Raises:
        ValueError: The loss is not finite, or the checkpoint does not fit the model.
    """
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    optimizer = make_optimizer(parameters, plan)
    progress = _resume(folder / "checkpoint.pt", parameters, optimizer)
    sampler, loss_of = Sampler(volumes, plan), segmentation_loss()
    with torch.random.fork_rng():
        for step in range(progress.step, plan.steps):
            started = time.perf_counter()
            torch.manual_seed(int(np.random.default_rng([plan.seed, step, 1]).integers(2**62)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(plan, step)
            images, labels = (tensor.to(device) for tensor in sampler(step))
            model.train()
            loss = loss_of(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.losses.append(loss.item())
            progress.step = step + 1
            if not math.isfinite(progress.losses[-1]):
                raise ValueError(
                    f"{folder}: the loss of step {step} is {progress.losses[-1]}, expected a finite number; "
                    f"try a learning rate below {plan.lr:g}"
                )
            progress.seconds += time.perf_counter() - started
            last = progress.step == plan.steps
            if validate is not None and (last or (plan.eval_every and progress.step % plan.eval_every == 0)):
                progress.curve.append([float(progress.step), validate(model)])
            if last or progress.step % plan.checkpoint_every == 0:
                _save(folder, parameters, optimizer, progress, plan)
            if on_step is not None:
                on_step(progress.step, progress.losses[-1])
    return progress


def _save(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    plan: Plan,
) -> None:
    dice = {int(step): value for step, value in progress.curve}
    rows = [
        {"step": step, "loss": loss, "lr": plan.lr * schedule(plan, step - 1), "val_dice": dice.get(step, "")}
        for step, loss in enumerate(progress.losses, start=1)
    ]
    write_csv(folder / "metrics.csv", rows)
    write_checkpoint(folder / "checkpoint.pt", {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(), "step": progress.step, "losses": progress.losses,
        "curve": progress.curve, "seconds": progress.seconds,
    })  # fmt: skip


@torch.no_grad()
def _resume(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint into the parameters and the optimizer; without one, Progress of no steps."""
    if not path.is_file():
        return Progress()
    content = read_checkpoint(path)
    saved = content["parameters"]
    if set(saved) != set(parameters):
        other = sorted(set(saved) ^ set(parameters))
        raise ValueError(f"{path}: holds other parameters than the model trains ({', '.join(other[:4])} differ)")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(content["step"], content["losses"], content["curve"], content["seconds"])
