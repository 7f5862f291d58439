"""The loss of a training step, and the precision in which its forward pass is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.training.losses import IgnoringLoss

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def segmentation_loss(class_weights: Sequence[float] = ()) -> nn.Module:
    """Dice and cross-entropy; the Dice loss leaves the background out.

    With it, a class of 2 % of the voxels was not learnt in 500 steps. Voxels that the labels ignore do not count.

    Args:
        class_weights: One for each class with the background first, on both losses; empty for equal weights.
    """
    from monai.losses.dice import DiceCELoss

    weight = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
    return IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, weight=weight))


class Precision:
    """Autocast of the forward pass; with float16 also the scaling of the loss (torch.amp.GradScaler).

    The loss itself is computed in float32. With "off" nothing differs from code without this class.

    Args:
        amp: One of `AMP`.
        device: Where the model is.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        self.dtype, self.device = AMP[amp], device
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None

    def loss(self, model: nn.Module, loss_of: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a model on windows, float32."""
        loss: Tensor
        if self.dtype is None:
            loss = loss_of(model(images), labels)
            return loss
        with torch.autocast(self.device.type, self.dtype):
            logits = model(images)
        loss = loss_of(logits.float(), labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        scaled: Any = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer step; the scaler leaves it out where a float16 gradient has overflowed."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


def check_amp(amp: str, device: torch.device) -> None:
    """Raise ValueError unless PyTorch computes a step of such networks in this precision on the device.

    Not every build has float16 kernels of convolutions for the CPU: a step of one layer of each kind is tried.
    """
    if amp not in AMP:
        raise ValueError(f"amp: found '{amp}', expected one of {', '.join(AMP)}")
    if AMP[amp] is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv3d(1, 4, 2, 2), nn.InstanceNorm3d(4), nn.GELU(), nn.ConvTranspose3d(4, 2, 2, 2), nn.Linear(4, 4),
            nn.LayerNorm(4), nn.Linear(4, 4),
        ).to(device)  # fmt: skip
        images = torch.randn(1, 1, 4, 4, 4).to(device)
        labels = torch.zeros(1, 4, 4, 4, dtype=torch.long, device=device)
    precision = Precision(amp, device)
    try:
        precision.backward(precision.loss(model, nn.CrossEntropyLoss(), images, labels))
        precision.step(torch.optim.SGD(model.parameters(), 1e-3))
    except RuntimeError as error:  # NotImplementedError is one
        raise ValueError(
            f"amp: found '{amp}' on {device.type}, where PyTorch {torch.__version__} does not compute it "
            f"({next(iter(str(error).splitlines()), '')}); expected off or another precision"
        ) from None
