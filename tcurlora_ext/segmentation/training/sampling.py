"""The windows of a training step: which cases, which crops, and their augmentation by MONAI's transforms."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tcurlora_ext.segmentation.dataset import Volume

from .plan import Plan

KEYS = ["image", "label"]
AUGMENT = ("none", "intensity", "full")
# Transforms of MONAI with what they are called on and with. They come in this order, and each draws its random numbers
# from a generator of its own: leaving some out, or adding flips, does not change what the ones before it draw.
_SPATIAL: list[tuple[str, Any, dict[str, Any]]] = [
    ("RandAffined", KEYS, {
        "prob": 0.7, "rotate_range": [0.2, 0.2, 0.2], "scale_range": [0.1, 0.1, 0.1], "mode": ["bilinear", "nearest"],
        "padding_mode": "border",
    }),
]  # fmt: skip
_INTENSITY: list[tuple[str, Any, dict[str, Any]]] = [
    ("RandAdjustContrastd", "image", {"prob": 0.3, "gamma": [0.8, 1.25]}),
    ("RandScaleIntensityd", "image", {"factors": 0.2, "prob": 0.5}),
    ("RandShiftIntensityd", "image", {"offsets": 0.2, "prob": 0.5}),
    ("RandGaussianNoised", "image", {"prob": 0.3, "std": 0.1}),
]
_FLIPS: list[tuple[str, Any, dict[str, Any]]] = [
    ("RandFlipd", KEYS, {"prob": 0.5, "spatial_axis": axis}) for axis in range(3)
]


def _augmentation(augment: str, flips: bool) -> list[tuple[str, Any, dict[str, Any]]]:
    spatial, intensity = (_SPATIAL if augment == "full" else []), (_INTENSITY if augment != "none" else [])
    return [*spatial, *intensity, *(_FLIPS if flips else [])]


def describe_augmentation(augment: str, flips: bool) -> dict[str, Any]:
    """The entry "augmentation" of run.json: MONAI's transforms in their order, with their parameters."""
    return {"transforms": [{"name": name, **values} for name, _, values in _augmentation(augment, flips)]}


class Sampler:
    """Draws the windows of a step: crops of padded volumes, two of three around foreground, with augmentation.

    Augmentation is a random affine deformation and random changes of contrast, scale, offset and noise, unless the plan
    says otherwise. Volumes that are in memory are padded once; others are read and padded for each window.
    """

    def __init__(self, volumes: Sequence[Volume], plan: Plan) -> None:
        import monai.transforms as mt

        self.plan, self.volumes = plan, volumes
        self.pad = mt.SpatialPadd(KEYS, plan.roi)
        self.items = None if getattr(volumes, "on_disk", False) else [self._padded(volume) for volume in volumes]
        self.augment = mt.Compose([
            mt.RandCropByPosNegLabeld(KEYS, "label", plan.roi, pos=2, neg=1, num_samples=1),
            *(getattr(mt, name)(on, **values) for name, on, values in _augmentation(plan.augment, plan.flips)),
        ])  # fmt: skip

    def _padded(self, volume: Volume) -> Any:
        return self.pad({"image": untracked(volume.image), "label": untracked(volume.label)})

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The windows of a step, which depend on the seed and the step alone.

        Returns:
            Images (accumulate * batch, C, *roi) and labels (accumulate * batch, 1, *roi).
        """
        rng = np.random.default_rng([self.plan.seed, step])
        count, wanted = len(self.volumes), self.plan.batch * self.plan.accumulate
        chosen = rng.choice(count, wanted, replace=wanted > count)
        images, labels = [], []
        for index in chosen.tolist():
            self.augment.set_random_state(seed=int(rng.integers(2**31)))
            item = self._padded(self.volumes[index]) if self.items is None else self.items[index]
            window: Any = self.augment(dict(item))
            window = window[0] if isinstance(window, list) else window
            # a copy: a crop that nothing has changed would keep its whole volume in memory
            images.append(untracked(window["image"]).clone())
            labels.append(untracked(window["label"]).clone())
        return torch.stack(images), torch.stack(labels)


def untracked(tensor: Tensor) -> Tensor:
    """A tensor without MONAI's record of the transforms applied to it, which would grow with every step."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


class _Steps(Dataset[tuple[Tensor, Tensor]]):
    """The windows of the steps from `start` to before `stop`, by index from 0."""

    def __init__(self, sampler: Sampler, start: int, stop: int) -> None:
        self.sampler, self.start, self.stop = sampler, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sampler(self.start + index)


def windows(sampler: Sampler, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What the sampler draws for the steps from `start`, by as many worker processes as its plan says."""
    plan = sampler.plan
    if plan.workers == 0 or start >= plan.steps:
        return map(sampler, range(start, plan.steps))
    loader = DataLoader(
        _Steps(sampler, start, plan.steps), batch_size=None, num_workers=plan.workers,
        worker_init_fn=_leave_interrupts, generator=torch.Generator(),
    )  # fmt: skip
    return iter(loader)


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training's own process decides what is done about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
