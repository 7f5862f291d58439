"""What is found out about an architecture, and what has to hold for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.coverage import Coverage, coverage

from .architecture import Architecture
from .language_models import LANGUAGE
from .vision_models import VISION_MODELS
from .volume_models import VOLUME_MODELS

ARCHITECTURES = (*LANGUAGE, *VISION_MODELS, *VOLUME_MODELS)
CONFIG = tcur.TCURConfig(rank=2)


@dataclass(frozen=True)
class Found:
    """What the default adapts of an architecture; ``refused`` is why it adapts nothing, or ""."""

    covers: Coverage
    refused: str = ""


def find(architecture: Architecture) -> Found:
    """The coverage of the default."""
    model = architecture.network()
    try:
        return Found(coverage(model, CONFIG))
    except ValueError as error:
        return Found(coverage(model, CONFIG, {}), str(error))


def check(architecture: Architecture, folder: Path) -> None:
    """With zero cores the output stays; all cores get gradients; it saves, loads and merges."""
    base = architecture.network()
    model = copy.deepcopy(base)
    with torch.no_grad():
        plain = architecture.output(base)
    assert plain.isfinite().all()
    tcur.inject(model, CONFIG)
    output = architecture.output(model)
    assert_close(output.detach(), plain, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    for name, stack in tcur.stacks(model).items():
        assert stack.core.grad is not None, name
        assert bool(stack.core.grad.any()), name
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            stack.core.copy_(0.3 * torch.randn(stack.core.shape))
        changed = architecture.output(model)
        assert (changed - plain).norm() > 1e-3 * plain.norm()
        tcur.save_adapter(model, folder / "adapter.safetensors")
        loaded = tcur.load_adapter(copy.deepcopy(base), folder / "adapter.safetensors")
        assert torch.equal(architecture.output(loaded), changed)
        merged = architecture.output(tcur.remove(tcur.merge(model)))
    assert (merged - changed).norm() < 1e-4 * changed.norm()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
