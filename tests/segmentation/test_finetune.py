"""Whole runs from the command line: the embedded default and a user's data, in miniature."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.dataset import synthetic
from tcurlora_ext.segmentation.methods import METHODS, STANDARD
from tcurlora_ext.segmentation.runs import pretraining
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings

SIZES = '{"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "features": 4}'


@pytest.fixture
def command() -> Callable[..., str]:
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


class Parser(HTMLParser):
    """Checks that tags close in order; collects images and table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_report(out: Path, methods: list[str]) -> None:
    text = (out / "report.html").read_text()
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    assert [src.split(",")[0] for src in parser.images] == ["data:image/png;base64"] * 2
    for src in parser.images:
        assert base64.b64decode(src.split(",")[1]).startswith(b"\x89PNG")
    assert len(re.findall(r'<div class="scroll"><img class=wide style="min-width: [1-9]\d+rem"', text)) == 2
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is fetched from elsewhere
    table = text.split("</table>")[0]
    assert re.findall(r"<tr><td class=l>([\w-]+)</td>", table) == methods


def test_the_embedded_default_in_miniature(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "EMBEDDED_SUBJECTS", {"source": (2, 1), "target": (2, 1)})
    make = synthetic.make_subject
    monkeypatch.setattr(synthetic, "make_subject", lambda *key: make(*key[:3], spacing=8.0))
    monkeypatch.setitem(METHODS["tcur-learned"].options, "warm_up", 2)
    out = tmp_path / "run"
    text = command(
        "finetune", "--output", out, "--sizes", SIZES, "--roi", 16, "--steps", 2, "--pretrain-steps", 2, "--rank", 4
    )
    for name in STANDARD:
        assert f"{name}, seed 0:" in text
    assert "with randomly initialised transformer blocks" in text
    assert "before adaptation: Dice" in text
    assert f"report: {out / 'report.html'}" in text.replace("\n", "")
    check_report(out, list(STANDARD))
    rows = read_csv(out / "metrics.csv")
    assert [row["method"] for row in rows] == list(STANDARD)
    summary = {row["method"]: row for row in read_csv(out / "summary.csv")}
    for row in rows:
        assert 0 <= float(row["dice"]) <= 1
        assert float(summary[row["method"]]["dice_mean"]) == pytest.approx(float(row["dice"]))
        assert float(row["dice"]) == pytest.approx(
            (float(row["dice grey matter"]) + float(row["dice white matter"])) / 2
        )
    assert set(read_json(out / "transformer.json")) == {"dice", "dice_with_random_blocks"}
    assert read_json(out / "run.json")["settings"]["pretrain_steps"] == 2
    # the adapter of a run is there for other commands
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        plain, adapted = load_base(out)(image), load_adapted(out, "tcur")(image)
    assert plain.shape == adapted.shape
    assert not torch.equal(plain, adapted)
    with pytest.raises(FileNotFoundError, match="seed3"):
        load_adapted(out, "tcur", seed=3)


def test_a_users_data_from_pretrain_to_report(command: Callable[..., str], data: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    command("pretrain", "--data", data, "--output", base, "--sizes", SIZES, "--roi", 16, "--steps", 3)
    names = json.loads((data / "dataset.json").read_text())
    names["labels"] = {"0": "background", "1": "front", "2": "back", "3": "nowhere"}  # another head
    (data / "dataset.json").write_text(json.dumps(names))
    command(
        "finetune", "--data", data, "--pretrained", base / "base.safetensors", "--output", out, "--method", "head,lora",
        "--seeds", 2, "--steps", 2, "--train-list", "one", "--lora-rank", 2, "--lr", "lora=1e-2",
    )  # fmt: skip
    check_report(out, ["head", "lora"])
    rows = read_csv(out / "metrics.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("head", "0"),
        ("lora", "0"),
        ("head", "1"),
        ("lora", "1"),
    ]
    assert {row["lr"] for row in rows if row["method"] == "lora"} == {"0.01"}
    assert read_csv(out / "summary.csv")[0]["dice_sd"] != ""
    assert read_json(out / "run.json")["base"]["head_is_new"] is True
    assert not (out / "before.json").exists()
    heads = [load_adapted(out, "head", seed).get_parameter("out.weight") for seed in (0, 1)]
    assert not torch.allclose(heads[0], heads[1], atol=1e-2)  # a new head starts elsewhere for each seed


def test_data_without_pretrained_weights_says_what_to_run(pristine_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tcurlora pretrain"):
        finetune(FinetuneSettings(pristine_data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": Path("nowhere.safetensors")}, "nowhere.safetensors"),
        ({"methods": ("tcur", "prompt")}, "expected each once of head"),
        ({"also_train": "encoder"}, "also-train: found 'encoder', expected 'head' or 'decoder'"),
        ({"seeds": 0}, "seeds: found 0"),
        ({"lr": {"prompt": 1.0}}, "lr: found prompt"),
        ({"device": "nonsense"}, "device: found 'nonsense'"),
        ({"val_fraction": 0.3}, "val-fraction: found 0.3 beside "),
        ({"val_fraction": 0.3, "data": None, "pretrained": None}, "val-fraction: found 0.3 without --data"),
        ({"network": "unetr", "roi": (32, 32, 32)}, "weights do not fit the network unetr"),
        ({"lr": {"head": -1.0}}, "lr of head: found -1.0"),
        ({"methods": ("head", "tcur"), "rank": 50}, "tcur: stack 32x16 ("),
        ({"methods": ("head", "tcur"), "rank": 500, "data": None, "pretrained": None}, "tcur: stack "),
        ({"methods": ("tcur:transform=wavelet",)}, "tcur:transform=wavelet: "),
        ({"methods": ("tcur-light:rank=50",)}, "tcur-light:rank=50: "),
        ({"methods": ("tcur-learned:rank=50",)}, "tcur-learned:rank=50: "),
        ({"methods": ("tcur-learned:rank=2:bits=3",)}, "bits is 3, expected one of 1, 2"),
        ({"methods": ("tcur-learned:rank=2:warm_up=0",)}, "tcur-learned:rank=2:warm_up=0: "),
        ({"methods": ("tcur-learned:rank=2:change=nowhere.pt",)}, "nowhere.pt: no such file or folder"),
        ({"methods": ("lora:bits=3",)}, "lora:bits=3: bits: found 3, expected one of 1, 2"),
        ({"methods": ("lora:init=nowhere.safetensors",)}, "nowhere.safetensors: no such file"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(
    changes: dict[str, object], message: str, settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        finetune(settings(**changes), tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_failed_pretraining_input_writes_nothing(data: Path, tmp_path: Path) -> None:
    (data / "imagesTr/case_000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="case_000"):
        pretrain(PretrainSettings(data, steps=1), tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--roi", "16,16"), "roi: found '16,16'"),
        (("--sizes", "[1]"), "sizes: found '[1]', expected a JSON object"),
        (("--lr", "fast"), "lr: found 'fast'"),
        (("--spacing", "-1"), "spacing: found '-1'"),
        (("--steps", "many"), "steps: found 'many', expected a whole number"),
        (("--alpha", "high"), "alpha: found 'high', expected a number"),
    ],
)
def test_options_that_do_not_parse_are_named(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["finetune", "--output", str(tmp_path / "run"), *words])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert "expected" in line
    assert not (tmp_path / "run").exists()


def test_unetr_trains_its_decoder_beside_an_adapter(pristine_data: Path, tmp_path: Path) -> None:
    sizes = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
    base, out = tmp_path / "base", tmp_path / "run"
    pretrain(PretrainSettings(pristine_data, "unetr", sizes, (32, 32, 32), steps=1), base)
    finetune(
        FinetuneSettings(pristine_data, base / "base.safetensors", methods=("decoder", "tcur"), steps=1, rank=4), out
    )
    numbers = {row["method"]: int(row["trained_numbers"]) for row in read_csv(out / "metrics.csv")}
    # 48 slices of 24x24 in one stack, 12 of 48x24 and 12 of 24x48: 72 cores of 4x4, the decoder beside them
    assert numbers["tcur"] == numbers["decoder"] + 72 * 4 * 4
