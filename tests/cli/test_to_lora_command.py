"""`tcurlora to-lora`, on a run folder, on an adapter file, and on wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import tcurlora_ext as tcur
from tcurlora_ext.cli.app import app

pytest.importorskip("monai")
peft = pytest.importorskip("peft")
networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
run_module = pytest.importorskip("tcurlora_ext.segmentation.runs.network")

SIZES = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "features": 4}


def make(folder: Path, beside: str) -> Path:
    """A run folder as finetune leaves it."""
    config = networks.NetworkConfig("vit", 1, 2, (16, 16, 16), None, SIZES)
    (folder / "tcur" / "seed0").mkdir(parents=True)
    config.save(folder / "network.json")
    model = networks.build_network(config)
    networks.save_weights(model, folder / "base.safetensors")
    tcur.unfreeze(tcur.inject(model, tcur.TCURConfig(rank=(2, 3))), [beside])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    tcur.save_adapter(model, folder / "tcur" / "seed0" / "adapter.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run"), "decoder")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["to-lora", *map(str, arguments)])


def on_base(run: Path) -> list[str]:
    return ["--model", "vit", "--kwargs", json.dumps(SIZES | {"roi": 16}), "--weights", str(run / "base.safetensors")]


def test_a_run_gives_the_same_output_in_peft(run: Path, tmp_path: Path) -> None:
    done = call(run, "--output", tmp_path / "lora")
    assert done.exit_code == 0, done.output
    # r*S of the fused qkv, a slice for each of q, k, v and out in two blocks
    assert f"tcur, seed 0: LoRA adapter of rank {3 * 8}, " in done.output
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert size < 1e6
    assert f", {size / 1e3:.1f} KB written to" in done.output
    assert "modules_to_save) decoder.0" in done.output
    adapted = run_module.load_adapted(run, "tcur", 0).eval()
    loaded = peft.PeftModel.from_pretrained(run_module.load_base(run), tmp_path / "lora").eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = adapted(x)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_an_adapter_file_with_its_base_gives_the_same_file(run: Path, tmp_path: Path) -> None:
    assert call(run, "--output", tmp_path / "run").exit_code == 0
    done = call(run / "tcur" / "seed0" / "adapter.safetensors", *on_base(run), "--output", tmp_path / "file")
    assert done.exit_code == 0, done.output
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_an_adapter_in_the_folder_is_replaced_only_when_asked(run: Path, tmp_path: Path) -> None:
    assert call(run, "--output", tmp_path).exit_code == 0
    done = call(run, "--output", tmp_path)
    assert done.exit_code == 2
    assert "has an adapter_config.json; expected a new folder, or --overwrite" in done.stderr
    assert call(run, "--output", tmp_path, "--overwrite").exit_code == 0


def test_what_cannot_be_written_ends_in_one_line(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    done = call(run / "tcur" / "seed0", "--output", output)
    assert done.exit_code == 2
    assert "holds no base weights, expected --model and --weights" in done.stderr
    done = call(run, "--output", output, "--max-rank", 4)
    assert done.exit_code == 2
    assert "expected at most max_rank = 4" in done.stderr
    done = call(make(tmp_path / "other", "out"), "--output", output)
    assert done.exit_code == 2
    assert "would also take lora_dropout of its own layers" in done.stderr
    assert not output.exists()
