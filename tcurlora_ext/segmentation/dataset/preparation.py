"""What is done to a volume before the network gets it: the same in training, in scoring and for new scans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tcurlora_ext.segmentation.packages import require_package


class Preparation:
    """Orientation to RAS, then resampling and normalisation, by MONAI's transforms.

    Intensities are clipped to the 0.5th and 99.5th percentile and normalised to mean 0 and standard deviation 1, per
    volume and channel: scanners share no intensity scale (maxima from 112 to 1.7e6 within one real data set).

    Args:
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.
        label: Whether a label comes with each image: it is resampled to the nearest voxel and not normalised.
    """

    def __init__(self, spacing: Sequence[float] | None, *, label: bool) -> None:
        require_package("monai")
        from monai.transforms import (
            Compose,
            EnsureTyped,
            NormalizeIntensityd,
            Orientationd,
            ScaleIntensityRangePercentilesd,
            Spacingd,
        )

        keys, modes = (["image", "label"], ("bilinear", "nearest")) if label else (["image"], ("bilinear",))
        with warnings.catch_warnings():
            # MONAI warns that a default for axis names will change; "RAS" means the same in both
            warnings.simplefilter("ignore")
            self._orient = Orientationd(keys, axcodes="RAS")
            steps: list[Any] = [
                ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True),
                NormalizeIntensityd("image", channel_wise=True),
                EnsureTyped(keys, dtype=torch.float32, track_meta=True),
            ]
            if spacing is not None:
                steps.insert(0, Spacingd(keys, pixdim=tuple(spacing), mode=modes))
            self._prepare = Compose(steps)

    def orient(self, data: dict[str, Any]) -> dict[str, Any]:
        """The volumes (C, X, Y, Z) under "image" and "label", turned and flipped to RAS without resampling."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oriented: dict[str, Any] = self._orient(data)
        return oriented

    def prepare(self, oriented: dict[str, Any], name: object) -> dict[str, Any]:
        """Oriented volumes, resampled and normalised, in float32.

        Args:
            oriented: What :meth:`orient` returns.
            name: Of the image, for the error.

        Raises:
            ValueError: Normalisation overflows float32.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: dict[str, Any] = self._prepare(oriented)
        if not bool(torch.isfinite(data["image"]).all()):
            raise ValueError(f"{name}: found intensities that cannot be normalised, expected a smaller range")
        return data
