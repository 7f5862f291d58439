"""Networks of convolutions: their weights are recognised, methods adapt or refuse them, and a run goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tcurlora_ext.adapter.model.structure import adapted_layers
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.methods import METHODS, MethodOptions, get_methods
from tcurlora_ext.segmentation.networks import build_network, check_network, get_spec, has_prefix, save_weights
from tcurlora_ext.segmentation.networks.building import NetworkConfig
from tcurlora_ext.segmentation.networks.checkpoints import Wanted, open_base
from tcurlora_ext.segmentation.networks.convolutional import window_multiple
from tcurlora_ext.segmentation.prediction.predictor import load_files, load_predictor
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import trainable

from .test_networks import CONFIGS, CONVOLUTIONAL

ADAPTS = ("tcur", "tcur-light", "curlora", "lora", "dora", "norms", "bitfit", "head", "decoder", "full")
# These need a task or a file; tests of tcur cover what they inject.
NEEDS_A_TASK = ("tcur-learned", "tcur-carried")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_adapts_convolutions_or_refuses_them_by_name(name: str) -> None:
    if name in NEEDS_A_TASK:
        pytest.skip("needs a task")
    (method,) = get_methods([name + (":rank=8" if name == "tcur-light" else "")])
    model, spec = build_network(CONFIGS["dynunet"]), get_spec("dynunet")
    options = MethodOptions(rank=4, lora_rank=2, own=method.own)
    if name not in ADAPTS:
        with pytest.raises(ValueError, match=r"found a Conv3d, expected a linear|found no layer that this method"):
            method.check_options(model, spec, options)
        return
    before = model.eval()(torch.zeros(1, 1, 16, 16, 16) + 0.5)
    method.prepare(model, spec, options, None)
    after = model(torch.zeros(1, 1, 16, 16, 16) + 0.5)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def test_convolutions_of_a_decoder_that_trains_get_no_adapter() -> None:
    spec = get_spec("dynunet")
    for name in ("tcur", "lora"):
        model = build_network(CONFIGS["dynunet"])
        (method,) = get_methods([name])
        method.prepare(model, spec, MethodOptions(also_train="decoder", rank=4, lora_rank=2), None)
        own = [key for key in trainable(model) if "core" in key or "lora_" in key]
        assert own
        assert not any(has_prefix(key, spec.decoder) for key in own)
        if name == "tcur":
            assert not any(has_prefix(key, spec.decoder) for key, _ in adapted_layers(model))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_weights_without_network_json_tell_network_and_sizes(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, path = build_network(config, 3), tmp_path / "weights.safetensors"
    save_weights(model, path)
    base = open_base(path, Wanted(1, 3, None, {}, config.roi, None))
    assert base.config.network == name
    assert check_network(base.config) == check_network(config)
    assert not base.head_is_new
    x = torch.randn(1, 1, *config.roi)
    assert torch.equal(base.model.eval()(x), model.eval()(x))
    other = open_base(path, Wanted(2, 4, None, {}, config.roi, None))
    assert other.head_is_new
    assert other.model(torch.randn(1, 2, *config.roi)).shape[1] == 4


def test_residual_blocks_and_kernels_that_are_no_cubes_are_told_too(tmp_path: Path) -> None:
    sizes = {"filters": [8, 8, 8], "strides": [1, [1, 2, 2], 2], "kernel_size": [[1, 3, 3], 3, 3], "res_block": True}
    config = NetworkConfig("dynunet", 1, 2, (16, 16, 16), None, sizes)
    save_weights(build_network(config), tmp_path / "weights.safetensors")
    base = open_base(tmp_path / "weights.safetensors", Wanted(1, 2, None, {}, config.roi, None))
    assert base.config.sizes == sizes


def test_windows_and_levels_are_checked() -> None:
    assert window_multiple({"strides": [1, 2, [1, 2, 2]]}, 8) == 4
    assert window_multiple({"blocks_down": [1, 1, 1, 1]}, 2) == 8
    with pytest.raises(ValueError, match="roi of dynunet: found 6x8x8, expected positive multiples of 4"):
        check_network(NetworkConfig("dynunet", 1, 2, (6, 8, 8), None, dict(CONFIGS["dynunet"].sizes)))
    with pytest.raises(ValueError, match=r"sizes of dynunet: found .* levels, expected as many of each"):
        build_network(NetworkConfig("dynunet", 1, 2, (8, 8, 8), None, {"filters": [8, 8, 8]}))


@pytest.mark.parametrize(
    ("network", "sizes", "message"),
    [
        (
            "dynunet", {"filters": [4, 8, 8]},
            r"found filters of 3, strides of 4, kernel_size of 4 levels, .*; a list that is not given has its default",
        ),
        ("vit", {"hidden_size": 16, "num_heads": 3}, "hidden_size"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_leave_no_folder(
    network: str, sizes: dict[str, Any], message: str, pristine_data: Path, tmp_path: Path
) -> None:
    settings = PretrainSettings(pristine_data, network, sizes, (16, 16, 16), steps=1)
    with pytest.raises(ValueError, match=message):
        pretrain(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_pretrains_adapts_and_predicts(pristine_data: Path, tmp_path: Path) -> None:
    config, base, run = CONFIGS["dynunet"], tmp_path / "base", tmp_path / "run"
    pretrain(PretrainSettings(pristine_data, "dynunet", config.sizes, config.roi, steps=1), base)
    finetune(FinetuneSettings(pristine_data, base / "base.safetensors", methods=("lora", "tcur"), steps=1, rank=4), run)
    numbers = {row["method"]: int(row["trained_numbers"]) for row in read_csv(run / "metrics.csv")}
    head = 8 * 3 + 3
    assert numbers["tcur"] == 11 * 4 * 4 + head  # 11 convolutions, a core of 4x4 each, and the head
    assert numbers["lora"] > 20 * numbers["tcur"]
    image = torch.randn(1, 1, *config.roi)
    predictor = load_predictor(run)
    by_file = load_files(run / "tcur" / "seed0" / "adapter.safetensors", base / "base.safetensors")
    with torch.no_grad():
        assert torch.equal(predictor.models[0](image), by_file.models[0](image))
