"""One method and one seed of a run: training, and what is written of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.records import read_json, write_csv, write_json
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.dataset.volumes import Volumes
from tcurlora_ext.segmentation.methods import Method, MethodOptions, Task, beside
from tcurlora_ext.segmentation.metrics import evaluation
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec, randomise
from tcurlora_ext.segmentation.runs.folder import RESULT
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, beside_rate
from tcurlora_ext.segmentation.runs.subjects import hold_out
from tcurlora_ext.segmentation.terminal import Display
from tcurlora_ext.segmentation.training.checkpoints import CHECKPOINT, METRICS
from tcurlora_ext.segmentation.training.logs import open_logs

# In result.json: the median time of a step without drawing its windows; what a step keeps for the backward pass, its
# gradients and AdamW's moments; and the most that is allocated on a GPU, with the weights.
COST = ("step_ms", "step_mib", "gpu_peak_mib")


@dataclass(frozen=True)
class Choice:
    """What a method trains with.

    Attributes:
        lr: Its peak learning rate.
        own: Its own options that differ from those after its name.
    """

    lr: float
    own: Mapping[str, Any] = field(default_factory=dict)

    def of(self, method: Method) -> Method:
        """The method with these options; its name and its folder are the same."""
        return replace(method, own={**method.own, **self.own})


@dataclass(frozen=True)
class Job:
    """What all methods and seeds of a run share."""

    out: Path
    settings: FinetuneSettings
    config: NetworkConfig
    head_is_new: bool
    classes: tuple[str, ...]
    train: Volumes
    val: Volumes
    device: torch.device
    display: Display


@dataclass(frozen=True)
class Fitted:
    """A trained model, and how and on what it was trained."""

    model: nn.Module
    volumes: Volumes
    options: MethodOptions
    plan: training.Plan
    progress: training.Progress
    trained: int


def fit(
    job: Job, method: Method, choice: Choice, seed: int, folder: Path, volumes: Volumes, *, title: str,
    validate: Callable[[nn.Module], float] | None = None,
) -> Fitted:  # fmt: skip
    """Train the base of a run by a method.

    Args:
        job: The run.
        method: The method.
        choice: What it trains with.
        seed: Of everything random.
        folder: For metrics and checkpoint; one that is there is resumed from.
        volumes: Those to train on; where the settings select or stop, a part of them is held out for that.
        title: For the progress bar.
        validate: As for :func:`training.train`.
    """
    spec, settings, method = get_spec(job.config.network), job.settings, choice.of(method)
    options = settings.options(spec.also_train, seed, method)
    model = load_base(job.out)
    if job.head_is_new:  # a head for other classes starts from random weights of its own for each seed
        randomise(model, job.config, spec.head, seed)
    plan, select = plan_of(job, method, choice.lr, options), None
    if settings.holds_out:
        kept, held = hold_out(volumes.names, settings)
        chosen, volumes = volumes.part(held), volumes.part(kept)

        def select(current: nn.Module) -> float:
            return evaluation.mean_dice(current, chosen, job.config)

    task = Task(volumes, plan, job.device, folder, lambda text: job.display.say(f"{title}: {text}"))
    method.prepare(model, spec, options, task)
    model.to(job.device)
    trained = sum(parameter.numel() for parameter in training.trainable(model).values())
    named = str(folder.relative_to(job.out))
    with (
        job.display.bar(title, plan.steps) as on_step,
        open_logs(settings.log, job.out, named, {"method": method.name, **asdict(plan)}) as log,
    ):
        progress = training.train(
            model, volumes, plan, folder, validate=validate, select=select, on_step=on_step, log=log
        )  # fmt: skip
    return Fitted(model, volumes, options, plan, progress, trained)


def adapt(job: Job, method: Method, choice: Choice, seed: int) -> dict[str, Any]:
    """Train by one method and seed, save the adapter, read it back and score it; returns the row of metrics.csv.

    Raises:
        Diverged: The loss is not finite. Of the seed's folder metrics.csv is left, so that it can begin anew.
    """
    folder = job.out / method.folder / f"seed{seed}"
    if (folder / RESULT).is_file():
        return read_result(folder)
    try:
        fitted = fit(
            job, method, choice, seed, folder, job.train, title=f"{method.name}, seed {seed}",
            validate=lambda current: evaluation.mean_dice(current, job.val, job.config),
        )  # fmt: skip
    except training.Diverged:
        for path in folder.glob("*"):
            if path.is_file() and path.name != METRICS:
                path.unlink()
        raise
    method.save(fitted.model, folder / "adapter.safetensors", fitted.options)
    scores = evaluation.evaluate(load_adapted(job.out, method.name, seed).to(job.device), job.val, job.config)
    write_csv(folder / "cases.csv", [
        {"case": case.name}
        | {f"dice {name}": value for name, value in zip(job.classes, case.dice, strict=True)}
        | {f"hd95_mm {name}": value for name, value in zip(job.classes, case.hd95, strict=True)}
        for case in scores
    ])  # fmt: skip
    progress = fitted.progress
    row = {
        "method": method.name, "seed": seed, "trained_numbers": fitted.trained, "lr": fitted.plan.lr,
        "steps": progress.step, **evaluation.summarise(scores, job.classes), "seconds": round(progress.seconds, 2),
        "warm_up_steps": method.warm_up(fitted.options),
        "adapter_bytes": (folder / "adapter.safetensors").stat().st_size, **cost_of(fitted),
    }  # fmt: skip
    write_json(folder / RESULT, row)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    job.display.say(
        f"{method.name}, seed {seed}: {fitted.trained:,} trained parameters, Dice {100 * row['dice']:.1f}, "
        f"HD95 {row['hd95_mm']:.2f} mm{_selected(fitted)}"
    )
    return row


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a method and seed from its folder; what an earlier version has not measured is None."""
    result = read_json(folder / RESULT)
    return {**result, **{name: result.get(name) for name in COST}}


def cost_of(fitted: Fitted) -> dict[str, Any]:
    """The median time of the steps in ms and the memory of one in MiB, as `COST` names them."""
    memory, step_ms = training.step_memory(fitted.model, fitted.volumes, fitted.plan), fitted.progress.step_ms
    costs = (None if math.isnan(step_ms) else round(step_ms, 3), round(memory.counted_mib, 3), memory.peak_mib)
    return dict(zip(COST, costs, strict=True))


def _selected(fitted: Fitted) -> str:
    """What selection and early stopping have done, as the end of a line."""
    progress, best = fitted.progress, fitted.progress.best
    parts = []
    if fitted.plan.select == "best" and best is not None:
        parts.append(f"weights of step {best.step}, Dice {100 * best.dice:.1f} on held-out training cases")
    elif fitted.plan.select == "best":
        parts.append("no held-out training case has a Dice, so that the weights are those of the last step")
    if progress.stopped and progress.step < fitted.plan.steps:
        parts.append(f"stopped after step {progress.step} of {fitted.plan.steps}")
    return "".join(f"; {part}" for part in parts)


def plan_of(job: Job, method: Method, lr: float, options: MethodOptions) -> training.Plan:
    """How a method trains: its learning rates, and the same steps and windows for all methods of a seed."""
    settings, spec = job.settings, get_spec(job.config.network)
    plan = training.Plan(
        settings.steps, settings.batch, lr, options.seed, job.config.roi,
        checkpoint_every=settings.checkpoint_every, eval_every=max(1, settings.steps // 3),
    )  # fmt: skip
    plan = training.with_options(plan, settings)
    if not method.adapter:
        return plan
    return replace(plan, beside=beside(spec, options), beside_lr=beside_rate(settings, spec.also_train))
