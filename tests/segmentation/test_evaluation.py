"""Scores against their definitions, on shapes whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.dataset import Volume, load_volumes, read_dataset
from tcurlora_ext.segmentation.metrics.evaluation import CaseScore, evaluate, mean_dice, predict, score, summarise
from tcurlora_ext.segmentation.networks import NetworkConfig


def volume(truth: Tensor, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Volume:
    return Volume("case", torch.zeros(1, *truth.shape), truth[None], truth[None], spacing)


def box(low: int, high: int) -> Tensor:
    labels = torch.zeros(20, 20, 20)
    labels[low:high, 5:15, 5:15] = 1
    return labels


def test_dice_and_hd95_of_a_shifted_box_in_mm() -> None:
    found = score(box(7, 17), volume(box(5, 15), spacing=(2.0, 1.0, 1.0)), classes=2)
    assert found.dice[0] == pytest.approx(0.8)  # 8 of 10 slices overlap
    assert found.hd95[0] == pytest.approx(4.0)  # two voxels of 2 mm


def test_a_perfect_prediction() -> None:
    found = score(box(5, 15), volume(box(5, 15)), classes=2)
    assert (found.dice, found.hd95) == ((1.0,), (0.0,))


def test_a_class_that_is_missed_counts_as_zero_dice_and_undefined_distance() -> None:
    missed = score(torch.zeros(20, 20, 20), volume(box(5, 15)), classes=2)
    assert missed.dice == (0.0,)
    assert math.isnan(missed.hd95[0])
    absent = score(box(5, 15), volume(torch.zeros(20, 20, 20)), classes=2)
    assert math.isnan(absent.dice[0])
    table = summarise([missed, CaseScore("b", (0.5,), (3.0,))], ["box"])
    assert table == {"dice": 0.25, "dice box": 0.25, "hd95_mm": 3.0, "hd95_mm box": 3.0, "hd95_undefined": 1}


class Threshold(nn.Module):
    """Logits of two boxes' brightness: 0 below 1, label 1 to 3, label 2 above."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([(image < 0.9) * 9.0, (image >= 0.9) * (image < 2.4) * 9.0, (image >= 2.4) * 9.0], 1)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
def test_predictions_lie_on_the_truths_grid(spacing: tuple[float, float, float] | None, pristine_data: Path) -> None:
    """Resampled to half the voxel size and back, a network that thresholds still finds the boxes."""
    (case,) = load_volumes(read_dataset(pristine_data).val[:1], spacing)
    if spacing is not None:
        assert case.image.shape[1] > case.truth.shape[1] * 1.9
    truth = case.truth.as_tensor()[0]  # type: ignore[attr-defined]
    image = case.image.as_tensor()  # type: ignore[attr-defined]
    levels = [image[:, case.label.as_tensor()[0] == value].mean() for value in (0, 1, 2)]  # type: ignore[attr-defined]
    case = Volume(
        case.name, (case.image - levels[0]) / (levels[2] - levels[0]) * 3, case.label, case.truth, case.spacing
    )
    found = predict(Threshold(), case, (16, 16, 16))
    assert found.shape == truth.shape
    assert (found == truth).float().mean() > 0.95


def test_the_quick_mean_dice_is_monais(pristine_data: Path) -> None:
    volumes = load_volumes(read_dataset(pristine_data).val, None)
    config = NetworkConfig("vit", 1, 3, (16, 16, 16))
    whole = summarise(evaluate(Threshold(), volumes, config), ["front", "back"])
    assert mean_dice(Threshold(), volumes, config) == pytest.approx(whole["dice"], abs=1e-6)
