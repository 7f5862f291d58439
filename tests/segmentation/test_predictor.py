"""Which adapted network is chosen from a run or from files, and what is said where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.methods import METHODS, STANDARD
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network, save_weights
from tcurlora_ext.segmentation.prediction.predictor import (
    choose_method,
    choose_seeds,
    load_files,
    load_predictor,
    open_run,
)
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.network import load_adapted
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_tcur_is_the_default_and_the_title_says_what_was_chosen(finished_run: Path) -> None:
    predictor = load_predictor(finished_run)
    assert predictor.title == f"{finished_run}: method tcur (by default; the run also has head), seed 0"
    assert predictor.labels == {0: "background", 1: "front", 2: "back"}
    expected = load_adapted(finished_run, "tcur", 0)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(predictor.models[0](image), expected(image))


def test_without_tcur_the_only_or_the_best_method_is_taken(run: Path) -> None:
    shutil.rmtree(run / "tcur")
    assert choose_method(open_run(run), None) == ("head", "the only finished method")
    shutil.copytree(run / "head", run / "decoder")
    for method, dice in (("head", 0.5), ("decoder", 0.75)):
        for seed in (0, 1):
            path = run / method / f"seed{seed}" / "result.json"
            write_json(path, {**read_json(path), "dice": dice})
    assert choose_method(open_run(run), None) == (
        "decoder", "the best on validation, Dice 75.0, of head, decoder",
    )  # fmt: skip


def test_methods_and_seeds_that_are_not_there_are_named(run: Path) -> None:
    (run / "head" / "seed1" / "result.json").unlink()
    opened = open_run(run)
    assert choose_seeds(opened, "tcur", "all") == choose_seeds(opened, "tcur", "0,1") == (0, 1)
    assert choose_seeds(opened, "tcur", None) == (0,)
    for seeds, message in (
        ("1", "seed 1 of 'head' is not a finished one, expected some of 0, or all"),
        ("x", "seed: found 'x', expected whole numbers"),
        ("0,0", "seed: found '0,0'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_seeds(opened, "head", seeds)
    with pytest.raises(ValueError, match="the method 'lora' was not part of it, expected one of head, tcur"):
        choose_method(opened, "lora")
    with pytest.raises(ValueError, match="method: found 'prompt', expected each once of head"):
        choose_method(opened, "prompt")
    (run / "head" / "seed0" / "result.json").unlink()
    with pytest.raises(ValueError, match="the method 'head' is not finished, expected one of tcur"):
        choose_method(open_run(run), "head")


def test_what_is_no_finished_run_is_named(run: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "nowhere", FileNotFoundError, "no such folder; expected a run folder"),
        (tmp_path / "file", ValueError, "found a file, expected a run folder"),
        (tmp_path / "empty", FileNotFoundError, "found no run.json"),
        (base.parent, ValueError, "found a run of 'pretrain', expected one of 'finetune'"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message) as raised:
            load_predictor(folder)
        assert str(raised.value).startswith(str(folder))
    for path in run.glob("*/seed*/result.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"found no finished method .* `tcurlora finetune --resume`"):
        load_predictor(run)


def test_a_run_without_its_base_is_named(run: Path) -> None:
    (run / "base.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors: no such file; expected it in a run folder"):
        load_predictor(run)


def test_an_adapter_file_of_every_method_gives_the_network_of_its_run(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS["tcur-learned"].options, "warm_up", 2)
    out = tmp_path / "run"
    finetune(settings(methods=STANDARD, steps=1, train_list="one"), out)
    image = torch.randn(1, 1, 16, 16, 16)
    for method in STANDARD:
        predictor = load_files(out / method / "seed0" / "adapter.safetensors", out / "base.safetensors")
        assert f"({method.removesuffix('-learned')})" in predictor.title  # a file of any form of tCUR says tcur
        assert predictor.labels == {0: "background", 1: "front", 2: "back"}
        with torch.no_grad():
            assert torch.equal(predictor.models[0](image), load_adapted(out, method)(image)), method


def test_a_base_with_a_head_for_other_classes_serves_an_adapter_with_its_own(
    finished_run: Path, base: Path, tmp_path: Path
) -> None:
    """One pretrained base for adapters of many tasks: its head has 5 classes, the adapter's 3."""
    config = replace(NetworkConfig.read(finished_run / "network.json"), out_channels=5)
    wide = build_network(config)
    weights = load_adapted(finished_run, "tcur").state_dict()
    own = {name: tensor for name, tensor in weights.items() if name in wide.state_dict() and "out." not in name}
    wide.load_state_dict(wide.state_dict() | own)
    config.save(tmp_path / "network.json")
    save_weights(wide, tmp_path / "base.safetensors")
    adapter = finished_run / "tcur/seed0/adapter.safetensors"
    predictor = load_files(adapter, tmp_path / "base.safetensors")
    assert predictor.config.out_channels == 3
    assert predictor.labels == {0: "background", 1: "label 1", 2: "label 2"}


def test_files_that_are_missing_or_do_not_fit_are_named(finished_run: Path, tmp_path: Path) -> None:
    adapter, base = finished_run / "head/seed0/adapter.safetensors", finished_run / "base.safetensors"
    with pytest.raises(FileNotFoundError, match="nowhere: no such file; expected an adapter file"):
        load_files(tmp_path / "nowhere", base)
    with pytest.raises(ValueError, match="found weights without an adapter's header, expected an adapter file"):
        load_files(base, base)
    alone = Path(shutil.copy(base, tmp_path / "base.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"network\.json: no such file; expected it beside"):
        load_files(adapter, alone)
    NetworkConfig("vit", 1, 3, (16, 16, 16)).save(tmp_path / "network.json")  # of the default sizes
    with pytest.raises(ValueError, match="weights do not fit the network vit"):
        load_files(adapter, alone)


def test_a_method_with_options_is_found_by_its_full_name(
    settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finetune(settings(methods=("head", "tcur:rank=2"), steps=1, train_list="one"), out)
    found = open_run(out)
    assert choose_method(found, "tcur:rank=2") == ("tcur:rank=2", "as asked for")
    predictor = load_predictor(out, "tcur:rank=2")
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(predictor.models[0](image), load_adapted(out, "tcur:rank=2")(image))
    with pytest.raises(ValueError, match="'lora' was not part of it"):
        choose_method(found, "lora")
