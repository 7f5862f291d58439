"""Training a network from random weights on a source data set: the base that adapters start from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tcurlora_ext.io.records import write_json
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.dataset import DataOptions, SegmentationDataset, synthetic
from tcurlora_ext.segmentation.dataset.cases import VAL_FRACTION
from tcurlora_ext.segmentation.dataset.subjects import check_pattern
from tcurlora_ext.segmentation.dataset.volumes import Volumes, open_volumes
from tcurlora_ext.segmentation.metrics import evaluation
from tcurlora_ext.segmentation.networks import (
    NetworkConfig,
    build_network,
    check_network,
    get_spec,
    save_weights,
)
from tcurlora_ext.segmentation.runs.folder import describe, open_folder, record
from tcurlora_ext.segmentation.runs.subjects import hold_out, record_held_out
from tcurlora_ext.segmentation.terminal import Display
from tcurlora_ext.segmentation.training import TrainingOptions, check_options, describe_augmentation
from tcurlora_ext.segmentation.training.logs import open_logs
from tcurlora_ext.segmentation.training.options import check_class_count

EMBEDDED_SUBJECTS = {"source": (24, 6), "target": (4, 8)}  # training and validation

Settings = TypeVar("Settings", bound=Any)  # of finetune or of pretrain


@dataclass(frozen=True)
class PretrainSettings(TrainingOptions, DataOptions):
    """Options of `tcurlora pretrain`, where they are described by --help.

    Attributes:
        data: None for the embedded source domain, whose subjects are made from `data_seed`.
        roi: The window in voxels.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.
        subjects: How many embedded subjects are made for training and for validation.
    """

    data: Path | None = None
    network: str = "vit"
    sizes: dict[str, Any] = field(default_factory=dict)
    roi: tuple[int, int, int] = (32, 32, 32)
    spacing: tuple[float, float, float] | None = None
    steps: int = 450
    batch: int = 2
    lr: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    subjects: tuple[int, int] = EMBEDDED_SUBJECTS["source"]
    checkpoint_every: int = 50
    device: str = "auto"


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU where PyTorch finds one, else the CPU. ValueError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: found '{name}', expected 'auto', 'cpu' or a device PyTorch sees ({error})"
        ) from error
    return torch.device(name)


def describe_data(data: SegmentationDataset) -> dict[str, Any]:
    """The entry "data" of run.json."""
    return {
        "labels": {str(value): name for value, name in data.labels.items()},
        "train": [case.name for case in data.train],
        "val": [case.name for case in data.val],
        "sha256": data.fingerprint,
    }


def embedded(folder: Path, domain: str, subjects: tuple[int, int], seed: int, display: Display) -> Path:
    """The folder of the embedded domain inside `folder`; its subjects are made unless they are complete."""
    target = folder / domain
    if not (target / "splits.json").is_file():
        display.say(f"making {sum(subjects)} {domain} subjects from the MNI152 template")
        synthetic.write_domain(target, domain, *subjects, seed=seed)
    return target


def check_positive(**values: float) -> None:
    """Raise ValueError, naming the option, unless every value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name.replace('_', '-')}: found {value}, expected a number above 0")


def with_fraction(settings: Settings) -> Settings:
    """The settings as run.json records them: with the fraction for validation that None stands for.

    Raises:
        ValueError: A fraction is given for the embedded domains, whose subjects are divided already.
    """
    if settings.data is None and settings.val_fraction is not None:
        raise ValueError(
            f"val-fraction: found {settings.val_fraction} without --data, expected none: the embedded subjects are "
            "made for training or for validation"
        )
    return replace(settings, val_fraction=VAL_FRACTION if settings.val_fraction is None else settings.val_fraction)


def pretrain(
    settings: PretrainSettings, out: Path, *, resume: bool = False, display: Display | None = None
) -> dict[str, float]:  # fmt: skip
    """Train a network from random weights and write it to the folder `out`.

    The folder gets run.json, metrics.csv, network.json and base.safetensors, checkpoint.pt while it trains, and at the
    very end transformer.json.

    Returns:
        The content of transformer.json: the result of :func:`evaluation.transformer_check` on the validation cases.

    Raises:
        ValueError, FileNotFoundError: Settings, data or folder are wrong; raised before anything is written.
    """
    display = display or Display()
    check_positive(
        steps=settings.steps, batch=settings.batch, lr=settings.lr, checkpoint_every=settings.checkpoint_every
    )
    device = pick_device(settings.device)
    check_pattern(settings.subject_pattern)
    check_options(settings, device)
    config = NetworkConfig(settings.network, 1, 2, settings.roi, settings.spacing, settings.sizes)
    config = replace(config, sizes=check_network(config))
    with torch.device("meta"):
        build_network(config)  # raises where sizes do not fit one another, before there is a folder
    description = describe("pretrain", with_fraction(settings))
    defaults = describe("pretrain", PretrainSettings())["settings"]
    data = settings.read_data(settings.data) if settings.data is not None else None
    if data is not None:
        check_class_count(settings, len(data.labels))
        if settings.holds_out:
            hold_out([case.name for case in data.train], settings)
    open_folder(out, description, resume, defaults)
    if data is None:
        data = settings.read_data(embedded(out / "data", "source", settings.subjects, settings.data_seed, display))
    record(out, "data", describe_data(data))
    display.say(data.division)
    record(out, "augmentation", describe_augmentation(settings.augment, settings.flips))
    record_held_out([case.name for case in data.train], settings, out, display)
    config = replace(config, in_channels=data.channels, out_channels=len(data.labels))
    model = build_network(config, settings.seed).to(device)
    train, val = (open_volumes(cases, settings.spacing, settings.cache) for cases in (data.train, data.val))
    _train(model, train, val, config, settings, out, display)
    config.save(out / "network.json")
    save_weights(model, out / "base.safetensors")
    check = evaluation.transformer_check(model, val, config, settings.seed)
    write_json(out / "transformer.json", check)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    display.say(describe_check(check, settings.network))
    return check


def _train(
    model: nn.Module, train: Volumes, val: Volumes, config: NetworkConfig, settings: PretrainSettings, out: Path,
    display: Display,
) -> None:  # fmt: skip
    """Train the network in place; resumed from a checkpoint in the run folder."""
    plan = training.Plan(
        settings.steps, settings.batch, settings.lr, settings.seed, settings.roi, settings.weight_decay,
        settings.checkpoint_every, max(1, settings.steps // 3),
    )  # fmt: skip
    plan = training.with_options(plan, settings)
    chosen = None
    if settings.holds_out:
        kept, held = hold_out(train.names, settings)
        chosen, train = train.part(held), train.part(kept)
    with (
        display.bar(f"pretraining {config.network}", plan.steps) as on_step,
        open_logs(settings.log, out, "pretrain", asdict(plan)) as log,
    ):
        training.train(
            model, train, plan, out, on_step=on_step, log=log,
            validate=lambda current: evaluation.mean_dice(current, val, config),
            select=None if chosen is None else lambda current: evaluation.mean_dice(current, chosen, config),
        )  # fmt: skip


def describe_check(check: dict[str, float], network: str) -> str:
    """One sentence on how much Dice the trained blocks of a network of this name are worth."""
    return (
        f"pretrained network, validation of the source domain: Dice {100 * check['dice']:.1f}, and "
        f"{100 * check['dice_with_random_blocks']:.1f} with randomly initialised {get_spec(network).blocks_are}"
    )
