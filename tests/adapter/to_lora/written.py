"""Adapted models, and what `to_lora` has written of them: loaded by PEFT, and read plainly as y + B A x."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

peft = pytest.importorskip("peft")
PREFIX = "base_model.model."


def inject(base: nn.Module, **options: Any) -> nn.Module:
    """A copy of the base, adapted, with cores that change the output."""
    model = tcur.inject(copy.deepcopy(base), tcur.TCURConfig(**({"rank": 2} | options)))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.3 * torch.randn(stack.slices, *stack.rank))
    return model


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def served(base: nn.Module, folder: Path) -> nn.Module:
    """The base with y + B A x * alpha / r in every module that the file names: what an engine computes."""
    config, tensors = config_of(folder), tensors_of(folder)
    model = copy.deepcopy(base)
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            B = tensors[f"{PREFIX}{name}.lora_B.weight"]
            scaling = config["lora_alpha"] / config["r"]
            model.get_submodule(name).register_forward_hook(
                lambda _, x, y, A=A, B=B * scaling: y + x[0] @ A.T.to(y) @ B.T.to(y)
            )
    return model


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def train_beside(model: nn.Module, patterns: list[str]) -> nn.Module:
    """Unfreeze what the patterns name, with other values than those of the base."""
    tcur.unfreeze(model, patterns)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "tcur_stacks" not in name:
            nn.init.normal_(parameter)
    return model


class Alike(nn.Module):
    """The module ``fc`` beside ``part.fc`` and ``part_fc``, whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.part_fc = nn.Linear(6, 6), nn.Linear(6, 6)
        self.part = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        self.last: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part_fc(self.part["fc"](torch.tanh(self.fc(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)) + self.shift)
