"""`tcurlora learn-factors`: a subspace learned on the training cases of a data set, for adapters to other cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.learning import warmup
from tcurlora_ext.maths.coding import CODED_BITS
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.dataset import load_volumes
from tcurlora_ext.segmentation.methods.tcur import prefixes_beside
from tcurlora_ext.segmentation.networks import get_spec, randomise
from tcurlora_ext.segmentation.pretraining import check_positive, pick_device
from tcurlora_ext.segmentation.run import FinetuneSettings, beside_rate, open_pretrained, read_data
from tcurlora_ext.segmentation.terminal import Display

# A subspace for a family of tasks is learned once, on more cases than one adapter has: docs/learned.md.
STEPS = 240


@dataclass(frozen=True)
class LearnSettings:
    """Options of `tcurlora learn-factors` beside those of the data and the network.

    Attributes:
        base: Data, pretrained weights, network, window, batch and device, as for finetuning.
        config: Of the adapters.
        steps: Of the warm-up.
        lr: Its learning rate.
        bits: Of an entry of the directions.
        seed: Of the windows, and of a new head.
    """

    base: FinetuneSettings
    config: tcur.TCURConfig
    steps: int = STEPS
    lr: float = warmup.LR
    bits: int = CODED_BITS
    seed: int = 0


def learn(settings: LearnSettings, output: Path, display: Display | None = None) -> tcur.Subspace:
    """Learn a subspace on the training cases of a data set and write it to a file.

    The head or decoder that would train beside an adapter trains in the warm-up too, and is not kept.

    Args:
        settings: What to learn on, and how.
        output: The file.
        display: Shows a bar and the result; None: on the standard output.

    Raises:
        ValueError, FileNotFoundError: Settings, data or weights are wrong, as for finetuning; nothing is written.
    """
    display, base = display or Display(), settings.base
    check_positive(steps=settings.steps, batch=base.batch, lr=settings.lr)
    if base.data is None or base.pretrained is None:
        raise ValueError("data, pretrained: expected a data set, and the file of the weights that adapters will be for")
    device = pick_device(base.device)
    data = read_data(base, base.data)
    found = open_pretrained(base, base.pretrained, data)
    config, model = found.config, found.model
    for line in found.said:
        display.say(f"weights: {line}")
    if found.random:
        base = replace(base, also_train="decoder")
    spec = get_spec(config.network)
    if found.head_is_new:
        randomise(model, config, spec.head, settings.seed)
    plan = training.Plan(settings.steps, base.batch, settings.lr, settings.seed, config.roi)
    step = training.loss_step(load_volumes(data.train, config.spacing), plan)
    beside = prefixes_beside(spec, base.options(spec.also_train, settings.seed))
    with display.bar(f"learning factors of {spec.name}", settings.steps) as on_step:
        subspace = tcur.learn_factors(
            model.to(device), settings.config, _counted(step, on_step), settings.steps, unfreeze=beside,
            unfreeze_lr=beside_rate(base, spec.also_train), lr=settings.lr, bits=settings.bits,
        )  # fmt: skip
    subspace.save(output)
    display.say(
        f"{output}: {len(subspace.stacks)} stacks, {output.stat().st_size:,} bytes; an adapter over it has "
        f"{subspace.parameters:,} trained parameters in its cores"
    )
    return subspace


def _counted(
    step: Callable[[nn.Module], Tensor], on_step: Callable[[int, float], None]
) -> Callable[[nn.Module], Tensor]:
    """A step that tells the bar how many have been taken."""
    taken = 0

    def counted(model: nn.Module) -> Tensor:
        nonlocal taken
        loss = step(model)
        taken += 1
        on_step(taken, float(loss.detach()))
        return loss

    return counted
