"""Dice and HD95 (95th percentile of the Hausdorff distance) of sliding-window predictions, by MONAI's metrics.

Scores are taken on the label's own grid: class probabilities at the network's voxel size are resampled to that grid
before the most probable class is taken, so the truth is never resampled.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec, randomise

OVERLAP = 0.25  # of neighbouring windows, where nothing else is asked for


@dataclass(frozen=True)
class CaseScore:
    """Scores of one case, one value per foreground class.

    Attributes:
        name: The case's.
        dice: 0 to 1; NaN where the truth has no voxel of the class.
        hd95: In mm; NaN where the truth or the prediction has no voxel of the class.
    """

    name: str
    dice: tuple[float, ...]
    hd95: tuple[float, ...]


@torch.no_grad()
def class_probabilities(models: Sequence[nn.Module], image: Tensor, roi: Sequence[int], overlap: float) -> Tensor:
    """Probabilities of the classes, from windows that MONAI weights by a Gaussian around their centre.

    Args:
        models: At least one, all on one device; of several, the mean of their probabilities is taken. They are left in
            eval mode.
        image: (C, X, Y, Z), prepared as :class:`~tcurlora_ext.segmentation.dataset.preparation.Preparation` says.
        roi: The window in voxels.
        overlap: Of neighbouring windows, as a fraction of the window, from 0 to below 1.

    Returns:
        (classes, X, Y, Z) float32, on the CPU: of the image, only windows are on the models' device.
    """
    from monai.inferers.utils import sliding_window_inference

    device = next(models[0].parameters()).device
    total: Tensor | None = None
    for model in models:
        model.eval()
        logits = sliding_window_inference(
            _untracked(image)[None].cpu(), tuple(roi), 4, model, overlap=overlap, mode="gaussian",
            sw_device=device, device="cpu",
        )  # fmt: skip
        assert isinstance(logits, Tensor)
        probabilities = logits[0].softmax(0)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total if len(models) == 1 else total.div_(len(models))


def class_maps(probabilities: Tensor, image: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Each class's probabilities, resampled from the grid of `image` to that of `like`.

    One class after the other: for a large scan, MONAI's coordinates in float64 take more memory than a class does.

    Args:
        probabilities: (classes, X, Y, Z), on the grid of `image`.
        image: (C, X, Y, Z), with MONAI's affine.
        like: (C, X', Y', Z'), with MONAI's affine.

    Yields:
        (X', Y', Z'); linear interpolation, and beyond the outermost voxels of `image` the value there.
    """
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import ResampleToMatch

    if _same_grid(image, like):
        yield from probabilities
        return
    resample = ResampleToMatch(mode="bilinear", padding_mode="border")
    for values in probabilities:
        found = MetaTensor(values[None], affine=image.affine)  # type: ignore[attr-defined]
        yield resample(found, like).as_tensor()[0]


def _untracked(image: Tensor) -> Tensor:
    """The same values without MONAI's metadata."""
    from monai.data.meta_tensor import MetaTensor

    return torch.as_tensor(image.as_tensor() if isinstance(image, MetaTensor) else image)


def _same_grid(a: Tensor, b: Tensor) -> bool:
    """Whether shapes are equal, and the affines where both have one."""
    if a.shape[1:] != b.shape[1:]:
        return False
    if not (hasattr(a, "affine") and hasattr(b, "affine")):
        return True
    return bool(torch.allclose(a.affine, b.affine, rtol=1e-5, atol=1e-4))  # 0.1 micrometres


def most_probable(maps: Iterable[Tensor]) -> Tensor:
    """The index of the class with the largest value in each voxel, int64; the first of equal ones."""
    best: Tensor | None = None
    for index, values in enumerate(maps):
        if best is None:
            best, found = values.clone(), torch.zeros_like(values, dtype=torch.int64)
        else:
            found[values > best] = index
            torch.maximum(best, values, out=best)
    return found


def predict(model: nn.Module, volume: Volume, roi: Sequence[int], overlap: float = OVERLAP) -> Tensor:
    """Predict a volume by overlapping windows of ``roi`` voxels.

    Returns:
        Class indices (X', Y', Z'), int64, on the grid of ``volume.truth`` and on the CPU. The model is left in eval
        mode.
    """
    probabilities = class_probabilities([model], volume.image, roi, overlap)
    return most_probable(class_maps(probabilities, volume.image, volume.truth))


def score(prediction: Tensor, volume: Volume, classes: int) -> CaseScore:
    """Dice and HD95 of predicted label values (X', Y', Z'); `classes` counts the background."""
    pair = one_hot_pair(prediction, volume.truth, classes)
    return CaseScore(volume.name, dice_scores(pair), hd95_scores(pair, volume.spacing))


def one_hot_pair(prediction: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class indices as (1, classes, X', Y', Z') of zeros and ones each, as MONAI's metrics take them.

    Voxels that the truth ignores are background in both, so that they count in no score.

    Args:
        prediction: (X', Y', Z').
        truth: (1, X', Y', Z'); below 0 where a voxel is ignored.
        classes: How many, with the background.
    """
    from monai.networks.utils import one_hot

    labels = torch.as_tensor(prediction)[None, None], torch.as_tensor(truth)[None]
    ignored = labels[1] < 0
    if bool(ignored.any()):
        found, wanted = labels
        labels = found.masked_fill(ignored.to(found.device), 0), wanted.masked_fill(ignored, 0)
    found, wanted = (one_hot(values, classes) for values in labels)
    return found, wanted


def dice_scores(pair: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Dice of each foreground class, 0 to 1; NaN where the truth has no voxel of it."""
    from monai.metrics.meandice import DiceMetric

    return tuple(DiceMetric(include_background=False, reduction="none")(*pair)[0].tolist())


def hd95_scores(pair: tuple[Tensor, Tensor], spacing: Sequence[float]) -> tuple[float, ...]:
    """HD95 of each foreground class in mm; NaN where truth or prediction has no voxel of it."""
    from monai.metrics.hausdorff_distance import HausdorffDistanceMetric

    metric = HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none")
    with warnings.catch_warnings():  # MONAI warns of an absent class, which is counted and shown here
        warnings.simplefilter("ignore")
        distance = metric(*pair, spacing=[list(spacing)])[0]
    return tuple(value if math.isfinite(value) else math.nan for value in distance.tolist())


def surface_dice_scores(pair: tuple[Tensor, Tensor], spacing: Sequence[float], tolerance: float) -> tuple[float, ...]:
    """Surface Dice of each foreground class, 0 to 1; NaN where the truth has no voxel of it.

    It is the share of both surfaces that lies within `tolerance` mm of the other one. Surfaces are made of elements
    between voxels, as in Nikolov et al. (arXiv 1809.04430).
    """
    from monai.metrics.surface_dice import SurfaceDiceMetric

    thresholds = [tolerance] * (pair[1].shape[1] - 1)
    metric = SurfaceDiceMetric(thresholds, include_background=False, reduction="none", use_subvoxels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an absent class, as for HD95
        scores = metric(*pair, spacing=[list(spacing)])[0]
    present = pair[1][0, 1:].flatten(1).any(1)
    return tuple(torch.where(present.cpu(), scores.cpu(), torch.nan).tolist())


def evaluate(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> list[CaseScore]:
    """Scores of every volume."""
    return [score(predict(model, volume, config.roi), volume, config.out_channels) for volume in volumes]


def mean_dice(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> float:
    """The "dice" of :func:`summarise`, without distances and so quick enough for a point of a learning curve."""
    cases = [
        dice_scores(one_hot_pair(predict(model, volume, config.roi), volume.truth, config.out_channels))
        for volume in volumes
    ]
    return finite_mean([finite_mean(values) for values in zip(*cases, strict=True)])


def finite_mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def summarise(scores: Sequence[CaseScore], classes: Sequence[str]) -> dict[str, float | int]:
    """Means over cases for each class, and over classes; NaN is left out of them.

    "hd95_undefined" counts the pairs of a case and a class that have no HD95.
    """
    dice = [finite_mean([case.dice[index] for case in scores]) for index in range(len(classes))]
    hd95 = [finite_mean([case.hd95[index] for case in scores]) for index in range(len(classes))]
    return {
        "dice": finite_mean(dice),
        **{f"dice {name}": value for name, value in zip(classes, dice, strict=True)},
        "hd95_mm": finite_mean(hd95),
        **{f"hd95_mm {name}": value for name, value in zip(classes, hd95, strict=True)},
        "hd95_undefined": sum(math.isnan(value) for case in scores for value in case.hd95),
    }


def transformer_check(
    model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig, seed: int
) -> dict[str, float]:
    """Dice with the trained transformer blocks, and with blocks that are initialised at random again.

    A network with the same score either way does not use its transformer: adapters inside it cannot be compared there.
    """
    changed = copy.deepcopy(model)
    randomise(changed, config, (get_spec(config.network).blocks,), seed + 1)
    return {
        "dice": mean_dice(model, volumes, config),
        "dice_with_random_blocks": mean_dice(changed, volumes, config),
    }
