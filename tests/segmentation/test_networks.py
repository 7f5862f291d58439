"""Networks by name: they run, their prefixes are their parameters', weights load or are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tcurlora_ext.segmentation.networks import (
    NETWORKS,
    NetworkConfig,
    build_network,
    get_spec,
    has_prefix,
    load_weights,
    randomise,
    read_weights,
    save_weights,
    target_layers,
)

CONFIGS = {
    "vit": NetworkConfig("vit", 1, 3, (16, 16, 16), None, {"hidden_size": 16, "mlp_dim": 32, "num_layers": 2,
                                                           "num_heads": 2, "features": 4}),
    "unetr": NetworkConfig("unetr", 1, 3, (32, 32, 32), None, {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48,
                                                               "num_heads": 2}),
    "swinunetr": NetworkConfig("swinunetr", 1, 3, (64, 64, 64), None, {"feature_size": 12}),
    "dynunet": NetworkConfig("dynunet", 1, 3, (16, 16, 16), None, {"filters": [8, 16, 16], "strides": [1, 2, 2],
                                                                   "kernel_size": [3, 3, 3]}),
    "segresnet": NetworkConfig("segresnet", 1, 3, (8, 8, 8), None, {"init_filters": 8, "blocks_down": [1, 1, 2],
                                                                    "blocks_up": [1, 1]}),
}  # fmt: skip
TARGETS = {"vit": 2 * 4, "unetr": 12 * 4, "swinunetr": 8 * 4, "dynunet": 11, "segresnet": 16}
CONVOLUTIONAL = ("dynunet", "segresnet")


@pytest.mark.parametrize("name", NETWORKS)
def test_network_runs_and_its_prefixes_are_real(name: str) -> None:
    config, spec = CONFIGS[name], get_spec(name)
    model = build_network(config).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, *config.roi)).shape == (1, 3, *config.roi)
    names = [name for name, _ in model.named_parameters()]
    for prefix in (*spec.head, *spec.decoder, spec.blocks):
        assert any(name.startswith(prefix) for name in names), prefix
    assert all(has_prefix(prefix, spec.decoder) for prefix in spec.head)
    assert not any(has_prefix(name, spec.decoder) for name in names if name.startswith(spec.blocks))
    targets = target_layers(model)
    assert len(targets) == TARGETS[name]
    if name not in CONVOLUTIONAL:
        assert all(target.startswith(spec.blocks) for target in targets)
    encoder = target_layers(model, spec.decoder)
    assert encoder == [target for target in targets if not has_prefix(target, spec.decoder)]
    assert encoder


def test_building_is_seeded_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_network(CONFIGS["vit"], seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["vit.blocks.0.attn.qkv.weight"], other["vit.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "bundle"])
def test_weights_come_back_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    model = build_network(CONFIGS["vit"], 1)
    path = tmp_path / ("base.safetensors" if kind == "safetensors" else "base.pt")
    if kind == "safetensors":
        save_weights(model, path)
    else:
        state = {("module." if kind == "bundle" else "") + name: value for name, value in model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3} if kind == "bundle" else state, path)
    other = build_network(CONFIGS["vit"], 2)
    assert load_weights(other, read_weights(path), get_spec("vit"), path) is False
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_head_for_other_classes_is_replaced_and_all_else_loaded(tmp_path: Path) -> None:
    model = build_network(CONFIGS["vit"], 1)
    path = tmp_path / "base.safetensors"
    save_weights(model, path)
    wider = build_network(NetworkConfig("vit", 1, 5, (16, 16, 16), None, CONFIGS["vit"].sizes), 2)
    head = wider.get_parameter("out.weight").clone()
    assert load_weights(wider, read_weights(path), get_spec("vit"), path) is True
    assert torch.equal(wider.get_parameter("out.weight"), head)
    assert torch.equal(wider.get_parameter("decoder.0.weight"), model.get_parameter("decoder.0.weight"))


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    tensors = dict(build_network(CONFIGS["vit"], 1).state_dict())
    tensors["vit.norm.weight"] = torch.zeros(7)
    del tensors["vit.blocks.0.attn.qkv.weight"]
    tensors["stray"] = torch.zeros(1)
    model = build_network(CONFIGS["vit"], 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"base\.pt: weights do not fit") as raised:
        load_weights(model, tensors, get_spec("vit"), Path("base.pt"))
    for part in ("vit.norm.weight is (7,), expected (16,)", "qkv.weight missing", "stray unknown"):
        assert part in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_loaded(value: float) -> None:
    """1e300 is finite in the file's float64, and infinite in the network's float32."""
    model = build_network(CONFIGS["vit"], 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.double() for name, tensor in before.items()}
    tensors["vit.norm.weight"] = torch.full((16,), value, dtype=torch.float64)
    message = r"base\.pt: found NaN or infinite values in vit\.norm\.weight, expected finite weights"
    with pytest.raises(ValueError, match=message):
        load_weights(model, tensors, get_spec("vit"), Path("base.pt"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_another_network_are_refused_with_names_of_both() -> None:
    model = build_network(CONFIGS["vit"])
    tensors = {f"module.encoder.{index}.weight": torch.zeros(1) for index in range(5)}
    with pytest.raises(ValueError, match="do not fit") as raised:
        load_weights(model, tensors, get_spec("vit"), Path("base.pt"))
    unknown = ", ".join(f"module.encoder.{index}.weight unknown" for index in range(3))
    assert f"{unknown} and 2 more" in str(raised.value)
    assert "vit.patch_embedding" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_quantised_weights_of_the_same_shape_are_refused() -> None:
    model = build_network(CONFIGS["vit"])
    tensors = model.state_dict() | {"vit.norm.weight": torch.ones(16, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"vit\.norm\.weight is \(16,\) of torch\.int8, expected \(16,\)"):
        load_weights(model, tensors, get_spec("vit"), Path("base.pt"))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    path.write_bytes(pickle.dumps({"state_dict": Trap(tmp_path / "sprung")}))
    with pytest.raises(ValueError, match=r"base\.pt: not a readable checkpoint"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_randomise_changes_what_it_names_and_no_more() -> None:
    model = build_network(CONFIGS["vit"], 1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    randomise(model, CONFIGS["vit"], ("vit.blocks.",), seed=9)
    for name, value in model.named_parameters():
        drawn = name.endswith("weight") and "norm" not in name
        assert torch.equal(value, before[name]) != (name.startswith("vit.blocks.") and drawn) or name.endswith("bias")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NetworkConfig("vnet", 1, 2, (16, 16, 16)), "network: found 'vnet', expected one of vit"),
        (NetworkConfig("vit", 1, 2, (16, 18, 16)), "found 16x18x16, expected positive multiples of 4"),
        (NetworkConfig("unetr", 1, 2, (24, 32, 32)), "expected positive multiples of 16"),
        (NetworkConfig("vit", 1, 2, (16, 16, 16), None, {"depth": 3}), "found depth, expected among patch_size"),
    ],
)
def test_a_wrong_configuration_is_named(config: NetworkConfig, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        build_network(config)
    assert message in str(raised.value)


def test_network_json_round_trips_and_unknown_keys_are_named(tmp_path: Path) -> None:
    config = NetworkConfig("vit", 1, 3, (16, 16, 16), (1.5, 1.5, 1.5), {"hidden_size": 16})
    config.save(tmp_path / "network.json")
    assert NetworkConfig.read(tmp_path / "network.json") == config
    (tmp_path / "network.json").write_text('{"network": "vit"}')
    with pytest.raises(ValueError, match=r"network\.json: found the keys"):
        NetworkConfig.read(tmp_path / "network.json")
