"""`tcurlora learn-factors`: a subspace learned on the training cases of data sets, for adapters to other cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.learning import warmup
from tcurlora_ext.maths.coding import CODED_BITS
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.runs.network import open_pretrained
from tcurlora_ext.segmentation.dataset import SegmentationDataset, load_volumes
from tcurlora_ext.segmentation.methods.tcur import prefixes_beside
from tcurlora_ext.segmentation.networks import get_spec, randomise
from tcurlora_ext.segmentation.runs.pretraining import check_positive, pick_device
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, beside_rate
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
        more: Further data sets of the family, whose steps take turns with those of `base`.
    """

    base: FinetuneSettings
    config: tcur.TCURConfig
    steps: int = STEPS
    lr: float = warmup.LR
    bits: int = CODED_BITS
    seed: int = 0
    more: tuple[Path, ...] = ()


def learn(settings: LearnSettings, output: Path, display: Display | None = None) -> tcur.Subspace:
    """Learn a subspace on the training cases of one or several data sets and write it to a file.

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
    data, *others = _data_sets(base, (base.data, *settings.more))
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
    steps = [training.loss_step(load_volumes(one.train, config.spacing), plan) for one in (data, *others)]
    beside = prefixes_beside(spec, base.options(spec.also_train, settings.seed))
    with display.bar(f"learning factors of {spec.name}", settings.steps) as on_step:
        subspace = tcur.learn_factors(
            model.to(device), settings.config, _counted(steps, on_step), settings.steps, unfreeze=beside,
            unfreeze_lr=beside_rate(base, spec.also_train), lr=settings.lr, bits=settings.bits,
        )  # fmt: skip
    subspace.save(output)
    display.say(
        f"{output}: {len(subspace.stacks)} stacks, {output.stat().st_size:,} bytes; an adapter over it has "
        f"{subspace.parameters:,} trained parameters in its cores"
    )
    return subspace


def _data_sets(base: FinetuneSettings, folders: Sequence[Path]) -> list[SegmentationDataset]:
    """The data sets in several folders. ValueError where one network cannot take them all."""
    found = [base.read_data(folder) for folder in folders]
    for other in found[1:]:
        for what, own, first in (
            ("channels", other.channels, found[0].channels), ("classes", len(other.labels), len(found[0].labels)),
        ):  # fmt: skip
            if own != first:
                raise ValueError(f"{other.root}: found {own} {what}, expected {first} as in {found[0].root}")
    return found


def _counted(
    steps: Sequence[Callable[[nn.Module], Tensor]], on_step: Callable[[int, float], None]
) -> list[Callable[[nn.Module], Tensor]]:
    """Steps that tell the bar how many have been taken."""
    taken = itertools.count(1)

    def counted(step: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
        loss = step(model)
        on_step(next(taken), float(loss.detach()))
        return loss

    return [partial(counted, step) for step in steps]
