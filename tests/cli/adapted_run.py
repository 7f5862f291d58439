"""A run folder as finetune leaves it, and the command called in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from typer.testing import CliRunner, Result

from tcurlora_ext.cli.app import app

SIZES = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 2, "features": 4}
KWARGS = json.dumps(SIZES | {"roi": 16})


@dataclass(frozen=True)
class Run:
    """A run folder as finetune leaves it, and the adapted network it holds."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "tcur" / "seed0" / "adapter.safetensors"

    @property
    def base(self) -> Path:
        return self.folder / "base.safetensors"

    @property
    def on_base(self) -> list[str]:
        return ["--model", "vit", "--kwargs", KWARGS, "--weights", str(self.base)]

    def network(self) -> torch.nn.Module:
        from tcurlora_ext.segmentation.runs.network import load_adapted

        return load_adapted(self.folder, "tcur", 0)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
