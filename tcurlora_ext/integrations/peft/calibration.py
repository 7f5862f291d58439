"""What the layers of a model read, for ``selection="activation"``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tcurlora_ext.adapter.model.calibration import input_sizes

from .config import TcurLoraConfig
from .targets import default_names, find_targets


def calibrate(model: nn.Module, config: TcurLoraConfig, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Measure, for ``TcurLoraConfig.calibration``, what the modules that a configuration names read.

    As :func:`tcurlora_ext.calibrate`; a PeftModel computes with its adapters disabled.

    Args:
        model: The model that the adapter will be put on.
        config: Names the modules; it stays as it is.
        batches: Inputs of the model, each its one argument, a tuple or list of all of them, or a mapping of keywords.

    Returns:
        Module name -> root mean square of each of its input features, (in,) float64 on the CPU.

    Raises:
        ValueError: No module matches, one is never called, or an input is not finite.
    """
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return calibrate(model.get_base_model(), config, batches)
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = default_names(model)
    targets = find_targets(model, config)
    if not targets:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of {type(model).__name__}")
    return input_sizes(model, targets, batches)
