"""The base weights that a command reads: any file's prefixes, and no NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("einops")

from tcurlora_ext.cli.model_source import build_model, load_model
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network, save_weights

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


def test_sizes_are_those_of_network_json_beside_the_weights_and_kwargs_go_over_them(tmp_path: Path) -> None:
    file = weights(tmp_path / "base.pt")
    sizes = {name: value for name, value in SIZES.items() if name != "roi"}
    NetworkConfig("vit", 1, 2, (8, 8, 8), None, sizes).save(tmp_path / "network.json")
    expected = load_model("vit", SIZES, file).state_dict()
    found = load_model("vit", {}, file).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    with pytest.raises(ValueError, match=r"mlp\.linear1\.weight is \(32, 16\), expected \(64, 16\)"):
        load_model("vit", {"mlp_dim": 64}, file)
    NetworkConfig("vit", 1, 2, (8, 8, 8), None, sizes | {"mlp_dim": 64}).save(tmp_path / "network.json")
    load_model("vit", {"mlp_dim": 32}, file)
    NetworkConfig("unetr", 1, 2, (16, 16, 16)).save(tmp_path / "network.json")
    load_model("vit", SIZES, file)


def test_weights_in_a_folder_have_network_json_there(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "roi"}
    config = NetworkConfig("vit", 2, 4, (8, 8, 8), None, sizes)
    config.save(tmp_path / "network.json")
    save_weights(build_network(config), tmp_path / "base.safetensors")
    assert load_model("vit", {}, tmp_path).get_parameter("out.weight").shape[0] == 4
