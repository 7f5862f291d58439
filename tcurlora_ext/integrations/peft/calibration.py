"""Measuring the inputs of a model's layers, for ``selection="activation"``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tcurlora_ext.adapter.model.calibration import input_sizes

from .config import TcurLoraConfig
from .targets import find_targets, with_names


def calibrate(model: nn.Module, config: TcurLoraConfig, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Measure the inputs of the modules that a configuration names, for ``TcurLoraConfig.calibration``.

    It works as :func:`tcurlora_ext.calibrate` does. A PeftModel runs with its adapters disabled.

    Args:
        model: The model that will get the adapter.
        config: Names the modules; it is not changed.
        batches: Inputs of the model: each is its only argument, a tuple or list of all its arguments, or a mapping of
            keyword arguments.

    Returns:
        Module name -> root mean square of every input feature of that module, (in,) float64 on the CPU.

    Raises:
        ValueError: No module matches, a module is never called, or an input is not finite.
    """
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return calibrate(model.get_base_model(), config, batches)
    config = with_names(config, model)
    targets = find_targets(model, config)
    if not targets:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of {type(model).__name__}")
    return input_sizes(model, targets, batches)
