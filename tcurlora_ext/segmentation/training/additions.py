"""What a method may add to a training step: a penalty on its parameters, and work after the optimizer's step."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

_ATTRIBUTE = "_step_addition"


class StepAddition(Protocol):
    """An addition to each training step; its state is a part of checkpoints, so that resumed runs are the same."""

    def penalty(self) -> Tensor:
        """A scalar, whose gradient is added to that of the loss."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, while the gradients are there, with the number of steps done."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold: tensors, numbers, strings, lists and dicts."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


def add_to_steps(model: nn.Module, addition: StepAddition) -> None:
    """Let :func:`train` call an addition in each step of a model.

    Args:
        model: The model.
        addition: An object that is no module itself, so that the model's modules stay as they are.
    """
    object.__setattr__(model, _ATTRIBUTE, addition)


def addition_of(model: nn.Module) -> StepAddition | None:
    """The addition to a model's steps; None where there is none."""
    addition: StepAddition | None = vars(model).get(_ATTRIBUTE)
    return addition
