"""The loss of segmentation, with voxels left out that the labels ignore."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class IgnoringLoss(nn.Module):
    """A DiceCELoss of MONAI's in which voxels with a label below 0 do not count; without any, it is the loss itself.

    Args:
        loss: With a softmax and one-hot labels; its Dice loss leaves the background out.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (N, C, X, Y, Z) for labels (N, 1, X, Y, Z).

        Ignored voxels become certain background for the Dice loss, which has neither a value nor a gradient there, and
        cross-entropy is the mean over the other voxels.
        """
        ignored = labels < 0
        if not bool(ignored.any()):
            total: Tensor = self.loss(logits, labels)
            return total
        certain = torch.full_like(logits[:1, :, :1, :1, :1], -torch.inf)
        certain[:, 0] = 0
        dice = self.loss.dice(torch.where(ignored, certain, logits), labels.masked_fill(ignored, 0))
        if bool(ignored.all()):  # the mean over no voxel is not defined
            return self.loss.lambda_dice * dice
        entropy = functional.cross_entropy(
            logits, labels.masked_fill(ignored, -1).squeeze(1).long(), weight=self.loss.cross_entropy.weight,
            ignore_index=-1,
        )  # fmt: skip
        return self.loss.lambda_dice * dice + self.loss.lambda_ce * entropy
