"""The scripts that train: UNETR, Llama, ViT, PlainConvUNet, many tasks at once. Every script is run in a test."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import EXAMPLES, LLAMA, NNUNET, RUNS, UNETR, VIT, Run, Script, table


def test_every_script_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, NNUNET}


@pytest.mark.parametrize("name", RUNS)
def test_the_docs_and_the_script_give_the_same_command(name: str) -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert f"python examples/{name}" in page
    assert f"python examples/{name}" in (EXAMPLES / name).read_text()


@pytest.mark.slow
def test_plainconvunet_learns_and_loads_what_it_saved(again: Script, tmp_path: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    output = again(NNUNET, "--pretrain-steps", "30", "--steps", "20", "--output", tmp_path / "a.safetensors")
    losses = dict(re.findall(r"^(.+): loss (\d\.\d+)", output, re.M))
    assert losses["the same, loaded"] == losses["tCUR with output layers"]
    assert float(losses["tCUR with output layers"]) < float(losses["before"])
    assert "16 of 20 convolutions" in output


def test_plainconvunet_says_which_package_is_missing(again: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    with pytest.raises(SystemExit, match="pip install dynamic-network-architectures"):
        again(NNUNET)


def test_unetr_saves_an_adapter_that_scores_the_same_when_loaded(runs: Callable[[str], Run]) -> None:
    folder, output = runs("unetr_hippocampus.py")
    rows = table(output)
    assert (folder / "adapter.safetensors").is_file()
    assert rows["tCUR with decoder,out"][1] == rows["the same, loaded"][1]
    alone, adapted = (int(rows[name][0].replace(",", "")) for name in ("decoder,out alone", "tCUR with decoder,out"))
    assert adapted - alone == (4 * 12 + 12 + 12) * 2 * 2  # q, k, v, out, linear1, linear2 of 12 blocks at rank 2


@pytest.mark.slow
def test_unetr_pretrains_until_its_loss_falls(runs: Callable[[str], Run]) -> None:
    losses = [float(loss) for loss in re.findall(r"of 40: loss (\S+)", runs("unetr_hippocampus.py")[1])]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_unetr_takes_weights_in_place_of_its_own(
    again: Script, runs: Callable[[str], Run], decathlon: Path, tmp_path: Path
) -> None:
    folder, output = runs("unetr_hippocampus.py")
    second = again(
        "unetr_hippocampus.py", "--data", decathlon, "--weights", folder / "base.safetensors", "--output", tmp_path,
        *UNETR,
    )  # fmt: skip
    assert "pretraining" not in second
    assert table(second)["before"] == table(output)["before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "DATA", "--cases", "5"], "--cases: found 5, expected fewer than 5"),
        (["--data", "DATA", "--cases", "2", "--unfreeze", "decoder,uot"], "--unfreeze: found 'uot'"),
        (["--data", "DATA", "--cases", "2", "--weights", "none.pt"], "none.pt: no such file"),
        (["--data", "DATA", "--cases", "2", "--weights", "BASE"], "weights do not fit the network unetr"),
    ],
)
def test_unetr_names_what_is_wrong(
    refused: Script, runs: Callable[[str], Run], decathlon: Path, arguments: list[str], message: str
) -> None:
    places: dict[str, str | Path] = {"DATA": decathlon}
    if "BASE" in arguments:
        places["BASE"] = runs("unetr_hippocampus.py")[0] / "base.safetensors"
    assert message in refused("unetr_hippocampus.py", *[places.get(argument, argument) for argument in arguments])


@pytest.mark.slow
def test_llama_learns_the_new_text_and_loads_what_it_saved(runs: Callable[[str], Run]) -> None:
    folder, output = runs("llama_peft.py")
    rows = table(output)
    before, lora, adapted, loaded = (float(rows[name][1]) for name in ("before", "LoRA", "tCUR", "tCUR, loaded"))
    assert max(lora, adapted) < before
    assert loaded == adapted
    assert rows["tCUR"][0] == f"{(8 + 4 + 2) * 8 * 8:,}"  # q, k, v, o; gate, up; down of two blocks
    assert json.loads((folder / "tcur" / "adapter_config.json").read_text())["peft_type"] == "TCURLORA"
    assert "it writes: '  // The " in output


@pytest.mark.slow
def test_llama_takes_a_folder_and_a_text(again: Script, runs: Callable[[str], Run], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    base = runs("llama_peft.py")[0] / "base"
    arguments = ["--model", base, "--text", tmp_path / "text.txt", "--output", tmp_path, *LLAMA]
    output = again("llama_peft.py", *arguments)
    assert "pretraining" not in output
    assert float(table(output)["tCUR"][1]) < float(table(output)["before"][1])


@pytest.mark.slow
def test_llama_names_what_is_wrong(refused: Script, runs: Callable[[str], Run], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    base = runs("llama_peft.py")[0] / "base"
    assert "--text nowhere.txt: no such file" in refused("llama_peft.py", "--text", "nowhere.txt")
    assert "found 0 windows of 128 tokens" in refused("llama_peft.py", "--model", base, "--text", short)
    assert "no-such-model" in refused("llama_peft.py", "--model", "./no-such-model", "--text", short)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class: dark and bright noise."""
    Image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, centre in (("dark", 60), ("bright", 190)):
        (root / name).mkdir()
        for index in range(12):
            Image.fromarray(rng.normal(centre, 20, (10, 12, 3)).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{index}.png"
            )
    return root


@pytest.mark.slow
def test_vit_learns_the_new_digits_and_loads_and_merges_what_it_saved(
    runs: Callable[[str], Run],
) -> None:
    folder, output = runs("vit_classification.py")
    rows = table(output)
    assert all(float(rows[name][1]) > float(rows["before"][1]) for name in ("LoRA and head", "tCUR and head"))
    assert "loaded equals trained: True" in output
    difference = re.search(r"merged differs by (\S+) of the logits", output)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert (folder / "adapter.safetensors").is_file()
    assert (folder / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_vit_takes_a_folder_of_images(
    again: Script, runs: Callable[[str], Run], pictures: Path, tmp_path: Path
) -> None:
    base = runs("vit_classification.py")[0] / "base"
    output = again("vit_classification.py", "--model", base, "--images", pictures, "--output", tmp_path, *VIT)
    assert float(table(output)["tCUR and head"][1]) > 75
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "bright", "1": "dark"}


@pytest.mark.slow
def test_vit_names_what_is_wrong(refused: Script, runs: Callable[[str], Run], pictures: Path, tmp_path: Path) -> None:
    base = runs("vit_classification.py")[0] / "base"
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    assert "found one of --model and --images" in refused("vit_classification.py", "--images", pictures)
    for folder, message in (
        (tmp_path / "nowhere", "nowhere: found 0 folders in it, expected one per class"),
        (pictures / "dark", "dark: found 0 folders in it"),
        (tmp_path, "cats: found no images"),
    ):
        assert message in refused("vit_classification.py", "--model", base, "--images", folder)
    for name in ("cats", "dogs"):
        (tmp_path / name / "broken.png").write_text("no image")
    assert "broken.png" in refused("vit_classification.py", "--model", base, "--images", tmp_path)


@pytest.mark.slow
def test_many_tasks_trained_together_end_where_each_ends_alone(runs: Callable[[str], Run]) -> None:
    _, output = runs("train_many.py")
    rows = table(output)
    assert float(rows["all 6 together"][2]) < float(rows["before"][2])
    assert "one after another (3 measured, multiplied)" in rows
    assert "each adapter: 128 trained parameters, 1,024 bytes" in output  # a core of two blocks, rank 8
    assert re.search(r"final losses of 3 tasks are equal to \S+ of each: True", output)
