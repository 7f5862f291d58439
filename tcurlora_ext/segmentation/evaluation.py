"""Dice and HD95 (95th percentile of the Hausdorff distance) of sliding-window predictions, by MONAI's metrics.

Scores are taken on the label's own grid: class probabilities at the network's voxel size are resampled to that grid
before the most probable class is taken, so the truth is never resampled.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec, randomise


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
def predict(model: nn.Module, volume: Volume, roi: Sequence[int]) -> Tensor:
    """Predict a volume by windows of ``roi`` voxels with 25 % overlap.

    Returns:
        Label values (X', Y', Z'), int64, on the grid of ``volume.truth`` and on the CPU. The model is left in eval
        mode.
    """
    from monai.data.meta_tensor import MetaTensor
    from monai.inferers.utils import sliding_window_inference
    from monai.transforms.spatial.array import ResampleToMatch

    model.eval()
    device = next(model.parameters()).device
    image = torch.as_tensor(volume.image.as_tensor() if isinstance(volume.image, MetaTensor) else volume.image)
    logits = sliding_window_inference(image[None].to(device), tuple(roi), 4, model, overlap=0.25, mode="gaussian")
    assert isinstance(logits, Tensor)
    probabilities = logits[0].softmax(0).cpu()
    if probabilities.shape[1:] != volume.truth.shape[1:]:
        found = MetaTensor(probabilities, affine=volume.image.affine)  # type: ignore[attr-defined]
        probabilities = ResampleToMatch(mode="bilinear", padding_mode="border")(found, volume.truth).as_tensor()
    return probabilities.argmax(0)


def score(prediction: Tensor, volume: Volume, classes: int) -> CaseScore:
    """Dice and HD95 of predicted label values (X', Y', Z'); `classes` counts the background."""
    pair = _one_hot_pair(prediction, volume, classes)
    return CaseScore(volume.name, _dice(pair), _hd95(pair, volume.spacing))


def _one_hot_pair(prediction: Tensor, volume: Volume, classes: int) -> tuple[Tensor, Tensor]:
    """Prediction and truth, each (1, classes, X', Y', Z') of zeros and ones, as MONAI's metrics take them."""
    from monai.networks.utils import one_hot

    labels = torch.as_tensor(prediction)[None, None], torch.as_tensor(volume.truth)[None]
    found, wanted = (one_hot(values, classes) for values in labels)
    return found, wanted


def _dice(pair: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    from monai.metrics.meandice import DiceMetric

    return tuple(DiceMetric(include_background=False, reduction="none")(*pair)[0].tolist())


def _hd95(pair: tuple[Tensor, Tensor], spacing: Sequence[float]) -> tuple[float, ...]:
    from monai.metrics.hausdorff_distance import HausdorffDistanceMetric

    metric = HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none")
    with warnings.catch_warnings():  # MONAI warns of an absent class, which is counted and shown here
        warnings.simplefilter("ignore")
        distance = metric(*pair, spacing=[list(spacing)])[0]
    return tuple(value if math.isfinite(value) else math.nan for value in distance.tolist())


def evaluate(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> list[CaseScore]:
    """Scores of every volume."""
    return [score(predict(model, volume, config.roi), volume, config.out_channels) for volume in volumes]


def mean_dice(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> float:
    """The "dice" of :func:`summarise`, without distances and so quick enough for a point of a learning curve."""
    cases = [
        _dice(_one_hot_pair(predict(model, volume, config.roi), volume, config.out_channels)) for volume in volumes
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
