"""The base weights that a command reads: any file's prefixes, and no NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("einops")

from tcurlora_ext.cli.model_source import build_model, load_model

SIZES = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4, "roi": 8}


def weights(path: Path, prefix: str = "", value: float = 0.5) -> Path:
    state = build_model("vit", SIZES).state_dict()
    torch.save({prefix + name: torch.full(tensor.shape, value) for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_prefixes_of_the_base_weights_are_undone(prefix: str, tmp_path: Path) -> None:
    model = load_model("vit", SIZES, weights(tmp_path / "base.pt", prefix))
    assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())


def test_base_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base\.pt: found NaN or infinite values in vit\..*, expected finite weights"):
        load_model("vit", SIZES, weights(tmp_path / "base.pt", value=float("nan")))
