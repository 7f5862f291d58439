"""Every script in examples/, run as its user would run it, on inputs that take seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")
for package in ("monai", "einops", "transformers", "accelerate", "peft", "sklearn", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package)

Image = pytest.importorskip("PIL.Image")
httpx = pytest.importorskip("httpx")

EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA = ["--hidden", "32", "--layers", "2", "--length", "32", "--characters", "60000", "--steps", "20"]
UNETR = ["--hidden", "24", "--features", "2", "--rank", "2", "--steps", "4", "--cases", "2"]
VIT = ["--steps", "40", "--pretrain-steps", "60", "--batch", "16", "--rank", "4"]
SERVE = ["--hidden", "32", "--layers", "2", "--rank", "2"]
MANY = ["--tasks", "6", "--alone", "3", "--steps", "10", "--width", "16", "--blocks", "2", "--pretrain-steps", "20"]


def printed(name: str, *arguments: str | Path) -> str:
    """What a script prints, run as a command on one thread with no network to fall back on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


NNUNET = "adapt_plainconvunet.py"  # apart from the others: nnU-Net's package is seldom there


def table(output: str) -> dict[str, list[str]]:
    """Rows of the printed table by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


Script = Callable[..., str]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """What a script prints when run in this process: importing everything is what takes long."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(again: Script, capsys: pytest.CaptureFixture[str]) -> Script:
    """What a script says of wrong input."""

    def run(name: str, *arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            again(name, *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six volumes in the layout of MSD's tasks, of about the size of Task04's: two bright boxes in noise."""
    root = tmp_path_factory.mktemp("data") / "Task04_Hippocampus"
    pairs = []
    for index in range(6):
        rng = np.random.default_rng(index)
        label = np.zeros((34, 48, 36), np.uint8)
        label[8:16, 12:34, 10:22], label[16:24, 12:34, 10:22] = 1, 2
        image = (label * 100 + rng.normal(0, 20, label.shape)).astype(np.float32)
        name = f"hippocampus_{index:03d}.nii.gz"
        for part, volume in (("imagesTr", image), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), root / part / name)
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class: dark and bright noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, centre in (("dark", 60), ("bright", 190)):
        (root / name).mkdir()
        for index in range(12):
            Image.fromarray(rng.normal(centre, 20, (10, 12, 3)).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{index}.png"
            )
    return root


def run_unetr(folder: Path, decathlon: Path) -> str:
    return printed(
        "unetr_hippocampus.py", "--data", decathlon, "--output", folder, *UNETR, "--pretrain-steps", "40",
    )  # fmt: skip


def run_llama(folder: Path, decathlon: Path) -> str:
    return printed("llama_peft.py", "--output", folder, *LLAMA, "--pretrain-steps", "60")


def run_vit(folder: Path, decathlon: Path) -> str:
    return printed("vit_classification.py", "--output", folder, *VIT)


def run_serve(folder: Path, decathlon: Path) -> str:
    return printed("serve_adapters.py", "--load-test", "2", "--clients", "4", "--many", "5", *SERVE)


def run_many(folder: Path, decathlon: Path) -> str:
    return printed("train_many.py", *MANY)


def run_groups(folder: Path, data: Path) -> str:
    """Its simulated subjects; folder and data are not needed."""
    del folder, data
    return printed("volumes_to_groups.py", "--permutations", "5", "--repeats", "1")


RUNS: dict[str, Callable[[Path, Path], str]] = {
    "unetr_hippocampus.py": run_unetr,
    "llama_peft.py": run_llama,
    "vit_classification.py": run_vit,
    "serve_adapters.py": run_serve,
    "train_many.py": run_many,
    "volumes_to_groups.py": run_groups,
}
Run = tuple[Path, str]  # the output folder and what was printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, decathlon: Path) -> Callable[[str], Run]:
    """By a script's name its output folder and what it printed; each is run once."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            folder = tmp_path_factory.mktemp(Path(name).stem)
            done[name] = folder, RUNS[name](folder, decathlon)
        return done[name]

    return run


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
def test_serving_answers_every_request_with_its_adapter(runs: Callable[[str], Run]) -> None:
    _, output = runs("serve_adapters.py")
    rows = table(output)
    assert list(rows) == ["base alone", "1 adapter", "5 adapters", "the same, changing"]
    for requests, *_, errors in rows.values():
        assert int(requests) > 0
        assert errors == "0"
    assert int(rows["the same, changing"][-2]) > 0
    equal = re.search(r"^(\d+) of (\d+) answers", output, re.M)
    assert equal is not None
    assert equal[1] == equal[2] != "0"


@pytest.mark.slow
def test_many_tasks_trained_together_end_where_each_ends_alone(runs: Callable[[str], Run]) -> None:
    _, output = runs("train_many.py")
    rows = table(output)
    assert float(rows["all 6 together"][2]) < float(rows["before"][2])
    assert "one after another (3 measured, multiplied)" in rows
    assert "each adapter: 128 trained parameters, 1,024 bytes" in output  # a core of two blocks, rank 8
    assert re.search(r"final losses of 3 tasks are equal to \S+ of each: True", output)


class Tags(HTMLParser):
    """Which elements are open; every end has to be that of the innermost one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {name for name, _ in attrs} & {"src", "href"}  # nothing is fetched from elsewhere
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Callable[..., Any], Any]]:
    """A server of a small model with two random adapters, as a process: a function for requests, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*SERVE, "--random", "2", "--port", str(port), "--max-tokens", "40", "--adapters", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, EXAMPLES / "serve_adapters.py", *arguments], env=environment)

    def ask(method: str, path: str, **body: Any) -> Any:
        return httpx.request(method, f"http://127.0.0.1:{port}{path}", json=body or None, timeout=60)

    try:
        for _ in range(600):
            with contextlib.suppress(httpx.ConnectError):
                ask("GET", "/stats")
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield ask, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_server_says_what_is_wrong_and_stops_when_asked(server: tuple[Callable[..., Any], Any]) -> None:
    ask, process = server

    def refused(status: int, message: str, method: str, path: str, **body: Any) -> None:
        response = ask(method, path, **body)
        assert response.status_code == status
        assert message in str(response.json()["detail"])

    refused(
        404, "no adapter 'random-9'; there are 2 (near it: random-", "POST", "/generate", adapter="random-9", prompt="a"
    )
    refused(404, "no adapter 'x'", "DELETE", "/adapters/x")
    refused(404, "no adapter 'x'", "PUT", "/adapters/x", seed=1)
    refused(400, "adapter 'random-0' is there already", "POST", "/adapters", name="random-0")
    refused(400, "outside the folder of adapters", "POST", "/adapters", name="x", file="../x.safetensors")
    refused(404, "none.safetensors", "POST", "/adapters", name="x", file="none.safetensors")
    refused(400, "together 44: expected at most 40", "POST", "/generate", prompt=[1, 2, 3, 4], new_tokens=40)
    refused(400, "prompt has the token 384, expected tokens from 0 to 383", "POST", "/generate", prompt=[5, 384])
    refused(422, "prompt", "POST", "/generate", prompt="")

    asked = {"prompt": "once upon", "new_tokens": 12}
    answers = [ask("POST", "/generate", adapter=name, **asked).json() for name in (None, "random-0", "random-1")]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 3
    assert ask("PUT", "/adapters/random-0", seed=1).status_code == 200
    assert ask("POST", "/generate", adapter="random-0", **asked).json()["tokens"] == answers[2]["tokens"]
    assert ask("DELETE", "/adapters/random-1").json() == {"removed": "random-1"}
    assert ask("GET", "/adapters").json() == {"adapters": ["random-0"]}
    stats = ask("GET", "/stats").json()
    assert (stats["finished"], stats["failed"], stats["running"], stats["adapters"]) == (4, 0, 0, 1)

    page = ask("GET", "/").text
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "http" not in page
    shown = re.findall(r"^  (\w+): \"", page, re.M)
    assert shown == list(stats)

    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT)


@pytest.fixture
def groups_tables(tmp_path: Path) -> tuple[Path, Path]:
    """The example's simulated volumes and subjects as files."""
    made = runpy.run_path(str(EXAMPLES / "volumes_to_groups.py"))["simulated"](60)
    paths = tmp_path / "volumes.csv", tmp_path / "subjects.csv"
    for frame, path in zip(made, paths, strict=True):
        frame.to_csv(path, index=False)
    return paths


def test_volumes_tell_groups_apart_and_permuted_groups_do_not(again: Script, groups_tables: tuple[Path, Path]) -> None:
    volumes, subjects = groups_tables
    found = table(again("volumes_to_groups.py", volumes, subjects, "--permutations", "20", "--repeats", "2"))
    aucs = {
        name: float(cells[0].split()[0])
        for name, cells in found.items()
        if name in ("age and sex", "volumes, adjusted")
    }
    assert aucs["volumes, adjusted"] > max(0.75, aucs["age and sex"])
    assert float(found["volumes, adjusted"][2]) < 0.1
    assert float(found["hippocampus"][0]) < -0.8
    lines = subjects.read_text().splitlines()
    swapped = [
        line.replace("AD", "CN") if index % 4 < 2 else line.replace("CN", "AD") for index, line in enumerate(lines[1:])
    ]
    subjects.write_text("\n".join([lines[0], *swapped]) + "\n")
    found = table(again("volumes_to_groups.py", volumes, subjects, "--permutations", "20", "--repeats", "2"))
    assert float(found["volumes, adjusted"][2]) > 0.05


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (("age", "years"), (), "expected age too"),
        (("CN", "EMCI"), (), "group CN: found 0 scans"),
        (("s001", "s003"), (), "found s003 twice"),
        ((" mm3", " ml"), (), "found no column that ends in ' mm3'"),
        (("", ""), ("--groups", "CN"), "expected two different names"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    change: tuple[str, str], words: tuple[str, ...], message: str, refused: Script, groups_tables: tuple[Path, Path]
) -> None:
    for path in groups_tables:
        path.write_text(path.read_text().replace(*change))
    assert message in " ".join(refused("volumes_to_groups.py", *groups_tables, *words).split())
