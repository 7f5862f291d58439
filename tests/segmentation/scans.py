"""Scans on disk, and a network whose answer for them is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.networks import NetworkConfig
from tcurlora_ext.segmentation.prediction.predictor import Predictor

SHAPE = (18, 22, 15)
CLASSES = {0: "background", 2: "shell", 7: "core"}


class Levels(nn.Module):
    """Logits of three levels of normalised brightness: a network whose answer is known."""

    def __init__(self, centres: tuple[float, float, float]) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(centres))

    def forward(self, image: Tensor) -> Tensor:
        return -8 * (image[:, :1] - self.levels.view(1, -1, 1, 1, 1)) ** 2


def levels(
    spacing: tuple[float, float, float] | None = None, channels: int = 1, centres: Any = (-0.3, 2.8, 6.0)
) -> Predictor:
    config = NetworkConfig("vit", channels, 3, (16, 16, 16), spacing)
    return Predictor((Levels(centres).eval(),), config, CLASSES, "levels", {"base_sha256": "of levels"})


def oblique(spacing: tuple[float, float, float] = (2.0, 2.2, 3.0)) -> np.ndarray:
    """An affine turned about two axes, with an origin."""
    a, b = np.radians(12), np.radians(-7)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = (-1.5, 2.25, -7.0)
    return affine


def blob(shape: tuple[int, ...] = SHAPE, affine: np.ndarray | None = None) -> np.ndarray:
    """A bright core in a shell, smooth and off the centre, in the space of the affine."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)])
    x, y, z = np.einsum("ij,jxyz->ixyz", affine, index)[:3] - np.array([16.0, 20.0, 14.0]).reshape(3, 1, 1, 1)
    radius = np.sqrt((x / 11) ** 2 + (y / 14) ** 2 + (z / 9) ** 2)
    return (1000 * (1 / (1 + np.exp(14 * (radius - 1))) + 1 / (1 + np.exp(14 * (radius - 0.5))))).astype(np.float32)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
