"""Forms of pretrained weights: what is loaded equals what was saved, and what was not is said or refused by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vitautoenc import ViTAutoEnc
from rich.console import Console
from torch import Tensor, nn

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network, checkpoints, save_weights
from tcurlora_ext.segmentation.networks.checkpoints import Wanted, base_warnings, open_base
from tcurlora_ext.segmentation.networks.forms import as_convolution
from tcurlora_ext.segmentation.prediction.predictor import load_predictor
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display

TINY: dict[str, Any] = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
VIT = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "features": 4}


def wanted(**changes: Any) -> Wanted:
    options = {"channels": 1, "classes": 3, "network": None, "sizes": {}, "roi": None, "spacing": None}
    return Wanted(**{**options, **changes})


def image(channels: int = 1, side: int = 32) -> Tensor:
    return torch.randn(1, channels, side, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def output(model: nn.Module, scan: Tensor) -> Tensor:
    result: Tensor = model.eval()(scan)
    return result


def save(path: Path, tensors: Mapping[str, Tensor], prefix: str = "", key: str | None = "state_dict") -> Path:
    state = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod.net."])
def test_an_old_unetr_with_a_linear_patch_embedding_gives_the_same_output(prefix: str, tmp_path: Path) -> None:
    """Early versions of MONAI: cls_token and cross-attention without use, no norm of it; a Lightning checkpoint."""
    torch.manual_seed(0)
    old = UNETR(1, 3, img_size=32, proj_type="perceptron", **TINY)
    state = {name: tensor for name, tensor in old.state_dict().items() if "norm_cross_attn" not in name}
    state["vit.patch_embedding.cls_token"] = torch.ones(1, 1, 24)
    state["vit.blocks.0.cross_attn.to_q.weight"] = torch.ones(24, 24)
    base = open_base(save(tmp_path / "old.ckpt", state, prefix), wanted(sizes={"num_heads": 2}))
    assert (base.config.network, base.config.roi, base.head_is_new) == ("unetr", (32, 32, 32), False)
    assert {name: base.config.sizes[name] for name in TINY} == TINY
    assert any("'perceptron'" in line for line in base.said)
    torch.testing.assert_close(output(base.model, image()), output(old, image()))


@pytest.mark.parametrize("sizes", [{"conv_block": False}, {"res_block": False}, {"qkv_bias": True}])
def test_sizes_of_unetr_are_told_from_its_weights(sizes: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = UNETR(2, 3, img_size=(32, 16, 16), **TINY, **sizes)
    path = save(tmp_path / "own.pt", own.state_dict())
    base = open_base(path, wanted(channels=2, sizes={"num_heads": 2}, roi=(32, 16, 16)))
    assert base.config.sizes.items() >= sizes.items()
    scan = image(2)[..., :16, :16]
    torch.testing.assert_close(output(base.model, scan), output(own, scan))
    with pytest.raises(ValueError, match=r"found 2 patches, which are no cube; expected their window in --roi"):
        open_base(path, wanted(channels=2, sizes={"num_heads": 2}))
    with pytest.raises(ValueError, match=r"own\.pt: found a hidden size of 24, .*heads; expected it in --sizes"):
        open_base(path, wanted(channels=2, roi=(32, 16, 16)))


def test_sizes_of_the_vit_segmenter_are_told_from_its_weights(tmp_path: Path) -> None:
    own = build_network(NetworkConfig("vit", 1, 3, (16,) * 3, None, {**VIT, "patch_size": 8}), 1)
    save_weights(own, tmp_path / "own.safetensors")
    base = open_base(tmp_path / "own.safetensors", wanted(sizes={"num_heads": 2}))
    assert torch.equal(output(base.model, image(side=16)), output(own, image(side=16)))


def test_heads_follow_the_convention_and_are_said(tmp_path: Path) -> None:
    own = build_network(NetworkConfig("vit", 1, 3, (8,) * 3, None, {**VIT, "hidden_size": 192, "num_heads": 3}))
    save_weights(own, tmp_path / "own.safetensors")
    base = open_base(tmp_path / "own.safetensors", wanted(classes=5))
    assert (base.config.sizes["num_heads"], base.head_is_new, base.random) == (3, True, ())
    assert "3 attention heads are assumed, which weights do not say" in base.said


def test_sizes_that_network_json_has_otherwise_are_refused(base: Path, settings: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sizes: found hidden_size 9999, expected hidden_size 16 as .*network\.json"):
        finetune(settings(sizes={"num_heads": 2, "hidden_size": 9999}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="sizes of vit: found depth, expected among"):
        open_base(base, wanted(sizes={"depth": 3}))
    assert open_base(base, wanted(sizes={"num_heads": 2, "patch_size": 4})).config.sizes["hidden_size"] == 16
    convolutions = NetworkConfig("dynunet", 1, 3, (16,) * 3, None, {"filters": [4, 4, 4, 4]})
    convolutions.save(tmp_path / "network.json")
    save_weights(build_network(convolutions), tmp_path / "base.safetensors")
    assert open_base(tmp_path / "base.safetensors", wanted(sizes={"filters": (4, 4, 4, 4)})).said == ()


@pytest.mark.parametrize("beside", [True, False])
def test_another_window_than_that_of_the_base_is_named(beside: bool, base: Path, settings: Any, tmp_path: Path) -> None:
    path = base
    if not beside:
        path = tmp_path / "base.safetensors"
        path.write_bytes(base.read_bytes())
    given = settings(pretrained=path, roi=(32, 32, 32), sizes={"num_heads": 2})
    message = r"position_embeddings is \(1, 64, 16\), .*; roi: found 32x32x32, expected 16x16x16, with which the base"
    with pytest.raises(ValueError, match=message):
        finetune(given, tmp_path / "run")
    with pytest.raises(ValueError, match="weights do not fit") as raised:
        open_base(path, wanted(network="unetr", roi=(32, 32, 32), sizes={"num_heads": 2}))
    assert "expected 16x16x16" not in str(raised.value)


# -- encoders alone ---------------------------------------------------------------------------------------------------


def swin() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(1, 3, feature_size=12, depths=(2, 1, 1, 1), num_heads=(2, 3, 6, 12))


@pytest.mark.parametrize("form", ["module.", "module.swinViT.", "encoder."])
def test_a_swin_encoder_of_self_supervised_pretraining(form: str, tmp_path: Path) -> None:
    """`model_swinvit.pt`; the head of its training around it; and a disruptive autoencoder's encoder."""
    encoder = swin().swinViT.state_dict()
    state = {}
    for name, tensor in encoder.items():
        stage, dot, rest = name.partition(".0.")
        stages = f"{stage}.0.0.{rest}" if form == "encoder." and dot and stage.startswith("layers") else name
        state[form + stages.replace("mlp.linear", "mlp.fc")] = tensor
    state[f"{'module.' if form != 'encoder.' else ''}rotation_head.weight"] = torch.ones(4, 4)
    state[f"{form}mask_token"] = torch.ones(1)
    base = open_base(save(tmp_path / "ssl.pt", state), wanted())
    assert (base.config.network, base.config.roi) == ("swinunetr", (96, 96, 96))
    assert base.config.sizes["depths"] == [2, 1, 1, 1]
    assert base.config.sizes["num_heads"] == [2, 3, 6, 12]
    loaded = base.model.state_dict()
    assert all(torch.equal(loaded[f"swinViT.{name}"], tensor) for name, tensor in encoder.items())
    assert base.head_is_new
    assert {"decoder1", "decoder5", "encoder1", "encoder10", "out"} <= set(base.random)
    text = "; ".join(base.said)
    assert f"an encoder alone, of which {len(encoder)} tensors are loaded; encoder1, " in text
    assert "rotation_head (1)" in text
    assert "mask_token (1)" in text
    assert "the decoder trains beside every adapter" in text
    assert "encoder10 stay as they start" in text


def autoencoder(layers: int = 2, patch: int = 4, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return ViTAutoEnc(1, (16,) * 3, (patch,) * 3, hidden_size=16, mlp_dim=32, num_layers=layers, num_heads=2, **sizes)


def masked(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return MaskedAutoEncoderViT(
        1, (16,) * 3, (4,) * 3, hidden_size=24, mlp_dim=32, num_layers=layers, num_heads=2, decoder_hidden_size=12,
        decoder_mlp_dim=24, decoder_num_layers=1, decoder_num_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (autoencoder, "conv3d_transpose (2)"),
        (lambda: autoencoder(proj_type="perceptron"), "conv3d_transpose_1 (2)"),
        (masked, "decoder_embed (2)"),
    ],
    ids=["autoencoder", "linear patch embedding", "masked autoencoder"],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_vit_encoder_of_self_supervised_pretraining(
    make: Callable[[], nn.Module], left_out: str, prefix: str, tmp_path: Path
) -> None:
    model = make()
    path = save(tmp_path / "ssl.pt", model.state_dict(), prefix, None)
    base = open_base(path, wanted(network="vit", sizes={"num_heads": 2, "features": 4, "patch_size": 4}))
    assert (base.config.roi, base.random, base.head_is_new) == ((16, 16, 16), ("decoder", "out"), True)
    assert left_out in "; ".join(base.said)
    vit, scan = base.model.get_submodule("vit"), image(side=16)
    model.eval(), vit.eval()
    with torch.no_grad():
        tokens = model.patch_embedding(scan)  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            tokens = block(tokens)
        expected = tokens if isinstance(model, MaskedAutoEncoderViT) else model.norm(tokens)  # type: ignore[operator]
        torch.testing.assert_close(vit(scan)[0], expected)


def test_an_encoder_that_fits_two_networks_needs_a_name(tmp_path: Path) -> None:
    small = save(tmp_path / "small.pt", autoencoder().state_dict())
    assert open_base(small, wanted(sizes={"num_heads": 2})).config.network == "vit"
    state = UNETR(1, 3, img_size=16, **TINY).vit.state_dict()
    path = save(tmp_path / "ssl.pt", state)
    with pytest.raises(ValueError, match=r"ssl\.pt: .* but no network\.json beside them; expected it or --network"):
        open_base(path, wanted(sizes={"num_heads": 2}))
    base = open_base(path, wanted(network="unetr", sizes={"num_heads": 2}))
    loaded = base.model.state_dict()
    assert all(torch.equal(loaded[f"vit.{name}"], tensor) for name, tensor in state.items())
    assert {"encoder1", "decoder2", "out"} <= set(base.random)


def test_an_incomplete_encoder_is_refused(tmp_path: Path) -> None:
    state = autoencoder().state_dict()
    del state["blocks.1.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"ssl\.pt: weights do not fit .*vit\.blocks\.1\.attn\.qkv\.weight missing"):
        open_base(save(tmp_path / "ssl.pt", state), wanted(sizes={"num_heads": 2}))


# -- channels, and bases that do not know the task --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unetr", "swinunetr", "vit"])
@pytest.mark.parametrize(("own", "new"), [(1, 2), (3, 1)])
def test_another_number_of_channels_adapts_the_first_layers(name: str, own: int, new: int, tmp_path: Path) -> None:
    """The same image in every channel gives the same output."""
    sizes = {"unetr": TINY, "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1]}, "vit": VIT}[name]
    base = build_network(NetworkConfig(name, own, 3, (32,) * 3, None, sizes), 1)
    save_weights(base, tmp_path / "base.safetensors")
    NetworkConfig(name, own, 3, (32, 32, 32), None, dict(sizes)).save(tmp_path / "network.json")
    found = open_base(tmp_path / "base.safetensors", wanted(channels=new))
    assert f"made for {own} input channels, adapted to {new}: the first layers' mean over them, repeated" in found.said
    parts = ("swinViT.patch_embed", "encoder1") if name == "swinunetr" else ("",)  # all of it takes seconds
    for part in parts:
        before, after = (model.get_submodule(part) for model in (base, found.model))
        expected = output(before, image().expand(-1, own, -1, -1, -1))
        result = output(after, image().expand(-1, new, -1, -1, -1))
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dice", "warned"), [(0.049, True), (0.051, False), (float("nan"), False)])
def test_a_base_that_scores_near_zero_is_warned_of(dice: float, warned: bool, tmp_path: Path) -> None:
    assert base_warnings(tmp_path) == []  # a new head has no score
    (tmp_path / "before.json").write_text(json.dumps({"dice": dice}))
    lines = base_warnings(tmp_path)
    assert bool(lines) == warned
    assert all("warning: the base scores near zero before adaptation (Dice 4.9)" in line for line in lines)


def test_finetune_shows_the_warning(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "NEAR_ZERO", 1.1)  # above every Dice
    text = io.StringIO()
    display = Display(Console(file=text, width=1000))
    finetune(settings(methods=("head",), steps=1), tmp_path / "run", display=display)
    assert text.getvalue().count("warning: the base scores near zero before adaptation (Dice ") == 1


def test_a_linear_patch_embedding_of_a_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"found 30 inputs of a patch embedding, expected a multiple of 16\*\*3"):
        as_convolution(torch.zeros(4, 30), 16)


# -- MONAI bundles ----------------------------------------------------------------------------------------------------

DEFINITION = {
    "_target_": "UNETR", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "img_size": "@window",
    "norm_name": "instance", "proj_type": "conv", **TINY,
}  # fmt: skip


def write_bundle(root: Path, definition: Any, name: str = "inference.json", **more: Any) -> Path:
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs/metadata.json").write_text(json.dumps({"name": "organs", "version": "0.1.0"}))
    (root / "configs" / name).write_text(json.dumps({"window": [32, 32, 32], "network_def": definition, **more}))
    torch.manual_seed(0)
    torch.save(UNETR(1, 3, img_size=32, **TINY).state_dict(), root / "models/model.pt")
    return root


@pytest.mark.parametrize("name", ["inference.json", "train.json"])
@pytest.mark.parametrize("target", ["UNETR", "monai.networks.nets.UNETR", "monai.networks.nets.unetr.UNETR"])
def test_a_bundles_network_is_built_with_its_weights(name: str, target: str, tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle", {**DEFINITION, "_target_": target}, name)
    base = open_base(root, wanted())
    assert base.said[0] == f"MONAI bundle organs 0.1.0: unetr as in {name}"
    assert (base.config.roi, base.config.sizes["num_heads"]) == ((32, 32, 32), 2)
    own = UNETR(1, 3, img_size=32, **TINY)
    own.load_state_dict(torch.load(root / "models/model.pt"))
    assert torch.equal(output(base.model, image()), output(own, image()))
    with pytest.raises(ValueError, match=r"network: found 'vit', expected unetr as .*bundle has it"):
        open_base(root, wanted(network="vit"))


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({**DEFINITION, "_target_": "UNet"}, "found the network 'UNet', expected one of UNETR, SwinUN"),
        ({**DEFINITION, "_target_": "mine.UNETR"}, "found the network 'mine.UNETR', expected one of UNETR, SwinUNETR"),
        (
            {**DEFINITION, "num_heads": "$__import__('pathlib').Path('SPRUNG').touch()"},
            "num_heads of network_def is an",
        ),
        ({**DEFINITION, "num_heads": "@heads"}, "network_def cannot be resolved"),
        ({**DEFINITION, "num_heads": "@trap"}, "num_heads of network_def is an expression, which is not run"),
        ({**DEFINITION, "norm_name": "batch"}, "found norm_name = batch of the network, expected instance"),
        ({**DEFINITION, "depth": 2}, "found the argument depth of the network, which is not read"),
        ("$net", "found no network_def or network with arguments, expected the definition of a network"),
    ],
)
def test_a_bundle_that_is_not_taken_is_named_and_nothing_of_it_run(
    definition: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trap = "$__import__('pathlib').Path('SPRUNG').touch()"
    root = write_bundle(tmp_path / "bundle", definition, imports=["$import this"], trap=trap)
    with pytest.raises(ValueError, match=r"inference\.json") as raised:
        open_base(root, wanted())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "SPRUNG").exists()


@pytest.mark.parametrize("name", ["configs/metadata.json", "configs/inference.json", "models/model.pt"])
def test_a_missing_file_of_a_bundle_is_named(name: str, tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle", DEFINITION)
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected") as raised:
        open_base(root, wanted())
    assert name in str(raised.value) or "found none of inference.json" in str(raised.value)


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_on_an_encoder_trains_the_decoder_beside_adapters(pristine_data: Path, tmp_path: Path) -> None:
    path, out = save(tmp_path / "mae.pt", masked().state_dict(), "module."), tmp_path / "run"
    settings: dict[str, Any] = {
        "methods": ("decoder", "tcur"), "steps": 2, "rank": 4, "network": "vit",
        "sizes": {"num_heads": 2, "features": 4},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"also-train: found 'head', expected 'decoder': it starts at random"):
        finetune(FinetuneSettings(pristine_data, path, also_train="head", **settings), out)
    assert not out.exists()
    finetune(FinetuneSettings(pristine_data, path, **settings), out)
    trained = {row["method"]: int(row["trained_numbers"]) for row in read_csv(out / "metrics.csv")}
    assert trained["tcur"] > trained["decoder"] > 1500
    recorded = read_json(out / "run.json")
    assert recorded["base"]["head_is_new"] is True
    assert recorded["weights"]["random"] == ["decoder", "out"]
    finetune(FinetuneSettings(pristine_data, path, **settings), out, resume=True)
    network = load_predictor(out, "tcur").models[0]
    base = build_network(NetworkConfig.read(out / "network.json"))
    base.load_state_dict(open_base(out / "base.safetensors", wanted()).model.state_dict())
    assert not torch.equal(network.get_parameter("decoder.0.weight"), base.get_parameter("decoder.0.weight"))
