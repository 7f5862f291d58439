"""Measuring the inputs of a model's layers, for ``selection="activation"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig

from .parameters import reader_of
from .targets import Target, find_targets, watching


def calibrate(model: nn.Module, config: TCURConfig, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Run the model on some batches and measure the inputs of its target modules, for :func:`inject`.

    The model runs in eval mode, without gradients; afterwards its mode is restored.

    Args:
        model: A model that is not adapted yet.
        config: The configuration for :func:`inject`; it names the modules.
        batches: Inputs of the kind that the model will get. A batch is the model's only argument, or a tuple or list
            of all its arguments, or a mapping of keyword arguments.

    Returns:
        Module name -> root mean square of every input feature of that module over all tokens of all batches, (in,)
        float64 on the CPU.

    Raises:
        ValueError: No module matches, a module is never called, or an input is not finite.
    """
    return input_sizes(model, find_targets(model, config), batches)


@torch.no_grad()
def input_sizes(model: nn.Module, targets: Sequence[Target], batches: Iterable[Any]) -> dict[str, Tensor]:
    """As :func:`calibrate`, for given targets."""
    read = next((target.name for target in targets if reader_of(model, target.name) is not None), None)
    if read is not None:
        raise ValueError(
            f"{read}: its inputs cannot be measured, because the module around it reads its weight and calls no layer; "
            "leave it out by exclude_modules, or use another rule"
        )
    squares: dict[str, Tensor] = {}
    tokens = dict.fromkeys((target.name for target in targets), 0)

    by_name = {target.name: target for target in targets}

    def note(name: str, x: Tensor) -> None:
        rows = by_name[name].rows_of(x)
        energy = rows.double().square().sum(0)
        squares[name] = squares[name] + energy if name in squares else energy
        tokens[name] += len(rows)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with watching(targets, note):
            for batch in batches:
                _call(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    found = {}
    for name, count in tokens.items():
        if not count:
            raise ValueError(f"{name} is a target, but none of the calibration batches reached it")
        size = (squares[name] / count).sqrt().cpu()
        # A convolution's features are channels at the taps of its kernel, neighbours those of one channel. They are
        # taken to be of one size, which leaves out the zeros around the volume.
        found[name] = size.repeat_interleave(by_name[name].shape[1] // len(size))
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"{name}: calibration inputs have NaN or infinite values, expected finite ones")
    return found


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def stack_inputs(members: Sequence[Target], calibration: Mapping[str, Tensor]) -> Tensor:
    """The root mean squares for the slices of a stack, (S, in). Raises ValueError for a module that has none."""
    slices = []
    for target in members:
        if target.name not in calibration:
            raise ValueError(
                f"{target.name} has no calibration inputs; call calibrate with the configuration of inject"
            )
        found = calibration[target.name]
        if found.shape != target.shape[1:]:
            raise ValueError(
                f"calibration inputs of {target.name} have shape {tuple(found.shape)}, expected {target.shape[1:]}"
            )
        slices += [found] * target.slices
    return torch.stack(slices)
