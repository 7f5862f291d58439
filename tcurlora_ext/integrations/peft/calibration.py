"""What the layers of a model read, for ``selection="activation"``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tcurlora_ext.adapter.calibration import input_sizes

from .config import TcurLoraConfig
from .targets import default_names, find_targets


def calibrate(model: nn.Module, config: TcurLoraConfig, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Run ``model`` on ``batches`` and return, for ``config.calibration``, what the modules that it names read.

    As :func:`tcurlora_ext.calibrate`; a PeftModel computes with its adapters disabled. The configuration stays as it
    is. Raises ValueError where no module matches, one is never called, or an input is not finite.
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
