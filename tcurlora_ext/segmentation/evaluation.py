"""Dice and the 95th percentile of the Hausdorff distance of sliding-window predictions, by MONAI's metrics.

Scores are taken on the label's own grid: class probabilities found at the network's voxel size are resampled to it
before the largest is taken, so the truth is never resampled.
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
    """Scores of one case, a number for each foreground class: Dice in 0..1, HD95 in mm.

    NaN: Dice where the truth has no such voxel; HD95 where truth or prediction has none.
    """

    name: str
    dice: tuple[float, ...]
    hd95: tuple[float, ...]


@torch.no_grad()
def predict(model: nn.Module, volume: Volume, roi: Sequence[int]) -> Tensor:
    """Predicted label values (X', Y', Z') on the truth's grid, on the CPU."""
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
    from monai.metrics.hausdorff_distance import HausdorffDistanceMetric
    from monai.metrics.meandice import DiceMetric

    def one_hot(labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels.long(), classes).movedim(-1, 0)[None].float()

    truth = torch.as_tensor(volume.truth)[0]
    pair = one_hot(torch.as_tensor(prediction)), one_hot(torch.as_tensor(truth))
    dice = DiceMetric(include_background=False, reduction="none")(*pair)
    with warnings.catch_warnings():  # an absent class is not a surprise here: it is counted and shown
        warnings.simplefilter("ignore")
        distance = HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none")(
            *pair, spacing=[list(volume.spacing)]
        )
    assert isinstance(dice, Tensor)
    assert isinstance(distance, Tensor)
    hd95 = tuple(value if math.isfinite(value) else math.nan for value in distance[0].tolist())
    return CaseScore(volume.name, tuple(dice[0].tolist()), hd95)


def evaluate(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> list[CaseScore]:
    """Scores of every volume."""
    return [score(predict(model, volume, config.roi), volume, config.out_channels) for volume in volumes]


def mean_dice(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> float:
    """Dice averaged over volumes, then over foreground classes; no distances, so it is quick enough for a curve."""
    total = torch.zeros(config.out_channels - 1, dtype=torch.float64)
    count = torch.zeros_like(total)
    for volume in volumes:
        prediction, truth = predict(model, volume, config.roi), torch.as_tensor(volume.truth)[0]
        for index in range(config.out_channels - 1):
            found, wanted = prediction == index + 1, truth == index + 1
            if wanted.any():
                total[index] += 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
                count[index] += 1
    return float((total / count)[count > 0].mean())


def finite_mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def summarise(scores: Sequence[CaseScore], classes: Sequence[str]) -> dict[str, float | int]:
    """Means over cases for each class and over classes; `hd95_undefined` counts pairs of case and class without one."""
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
    """Dice with the trained transformer blocks and with blocks as at a random start, all else kept.

    A network that scores the same either way does not use its transformer, and comparing adapters in it means nothing.
    """
    changed = copy.deepcopy(model)
    randomise(changed, config, (get_spec(config.network).blocks,), seed + 1)
    return {
        "dice": mean_dice(model, volumes, config),
        "dice_with_random_blocks": mean_dice(changed, volumes, config),
    }
