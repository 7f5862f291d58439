"""`tcurlora plan`: where models come from, what is written, and what wrong input says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tcurlora_ext.cli.app import app

SMALL = '{"roi": 32, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4, "feature_size": 4}'
MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(width, width)}) for _ in range(2))

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        attention = lambda: nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        convolutions = lambda: nn.ModuleDict({name: nn.Conv3d(1, 2, 3, bias=False) for name in "ab"})
        block = lambda: nn.ModuleDict({"attn": attention(), "convs": convolutions()})
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.lm_head = nn.Linear(8, 8)

def not_a_model(): return 3
def broken(): raise RuntimeError("no\\nmodel")
value = 5
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "own_networks:Net"


def test_the_papers_numbers_for_unetr(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    done = run("unetr", "--json", str(tmp_path / "plan.json"), "--csv", str(tmp_path / "plan.csv"))
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "plan.json").read_text())
    (total,) = (row for row in content["rows"] if row["stack"] == "total" and row["method"] == "tcur")
    assert total["trained"] == 4608
    assert (total["layers"], total["slices"]) == (48, 72)
    with (tmp_path / "plan.csv").open() as file:
        assert [row["trained"] for row in csv.DictReader(file)] == [str(row["trained"]) for row in content["rows"]]
    # 216 tokens of a 96^3 window in patches of 16, from a forward pass on the meta device.
    assert {row["tokens"] for row in content["rows"] if row["stack"] == "768x768"} == {24 * 216}
    table = done.output[: done.output.index("adapted:")].splitlines()
    assert max(map(len, table)) <= 80
    assert [line.split()[:4] for line in table if line.startswith("total")] == [["total", "frozen", "73.38"]]
    (tcur,) = (line.split() for line in table if " 4,608 " in line)
    assert tcur[:5] == ["tCUR", "r=8", "4,608", "99.79", "1.360"]  # of the base's 73.38 GFLOP
    assert "LoRA r=8" in done.output
    wide = run("unetr", "--wide").output
    assert "768 x 768" in wide
    assert "backward GFLOP" in wide


def test_a_tree_says_what_is_adapted_and_what_is_not(own_model: str) -> None:
    done = run("own_networks:Mixed", "--rank", "2")
    assert done.exit_code == 0, done.output
    tree = done.output[done.output.index("adapted: 4 of 5 linear layers") :].splitlines()
    assert tree == [
        "adapted: 4 of 5 linear layers, 89% of their weights; left out: lm_head (a head); 216 weights that are a "
        "convolution",
        "├── layers.*",
        "│   ├── attn",
        "│   │   ├── qkv  2 x linear, 384 weights: adapted as 3 slices each",
        "│   │   └── proj  2 x linear, 128 weights: adapted",
        "│   └── convs  4 x convolution, 216 weights: left out",
        "└── lm_head  1 x linear, 64 weights: left out, a head",
    ]
    content = json.loads(run("own_networks:Mixed", "--rank", "2", "--json", "-").stdout)["coverage"]
    assert (content["adapted"], content["linear"], content["share"]) == (4, 5, 512 / 576)
    assert content["groups"][0] == {
        "name": "layers.*.attn.qkv", "kind": "linear", "slices": 3, "reason": "", "layers": 2, "weights": 384,
    }  # fmt: skip


def test_json_alone_on_stdout(own_model: str) -> None:
    done = run(own_model, "--target", "q_proj", "--rank", "2", "--json", "-")
    content = json.loads(done.stdout)
    assert content["tokens"] == "2048 tokens a layer"
    assert [row["trained"] for row in content["rows"] if row["method"] == "tcur"] == [8, 8]


@pytest.mark.parametrize("preset", ["swinunetr", "vit"])
def test_the_other_presets(preset: str) -> None:
    pytest.importorskip("monai")
    done = run(preset, "--batch", "2", "--dtype", "bfloat16", "--stack-by", "role", "--rank", "2,3", "--lora-rank", "4")
    assert done.exit_code == 0, done.output
    assert "2 window(s)" in done.output
    assert "bfloat16, tCUR of rank 2,3 beside LoRA of rank 4" in done.output


def test_choices_reach_the_configuration(own_model: str) -> None:
    """Two stacks of one layer with q = 2 and rank 3 for the second; then one of two with one frequency of two."""
    parted = ("--stack-blocks", "1", "--rank-pattern", r"layers\.1\..*=3,2", "--dropout", "0.1")
    done = run(own_model, "--target", "q_proj", "--rank", "1", *parted, "--json", "-")
    rows = [row for row in json.loads(done.stdout)["rows"] if row["method"] == "tcur"]
    assert [(row["slices"], row["rank"], row["trained"]) for row in rows] == [(1, "1,1", 1), (1, "3,2", 6), (2, "", 7)]
    done = run(own_model, "--target", "q_proj", "--rank", "2", "--frequencies", "1", "--json", "-")
    assert [(row["q"], row["trained"]) for row in json.loads(done.stdout)["rows"][1:2]] == [(2, 4)]


def test_options_reach_the_configuration(own_model: str) -> None:
    done = run(
        own_model, "--kwargs", '{"width": 12}', "--target-regex", r"layers\.\d\.q_proj", "--exclude", "0.q_proj",
        "--split", "q_proj=3", "--transform", "dct", "--trainable", "all", "--core-domain", "slice", "--rank", "3,2",
        "--tokens", "7", "--json", "-",
    )  # fmt: skip
    content = json.loads(done.stdout)
    tcur = content["rows"][1]
    assert (tcur["slices"], tcur["out"], tcur["in"], tcur["tokens"], tcur["q"]) == (3, 4, 12, 7, 6)
    assert content["config"]["exclude_modules"] == ["0.q_proj"]
    assert (content["config"]["transform"], content["config"]["core_domain"]) == ("dct", "slice")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_transformers_configuration(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    source = tmp_path if form == "folder" else tmp_path / "config.json"
    done = run(str(source), "--rank", "2", "--kwargs", '{"num_hidden_layers": 3}', "--json", "-")
    rows = json.loads(done.stdout)["rows"]
    found = {row["stack"]: row["slices"] for row in rows if row["method"] == "tcur"}
    # q and o in one stack, the smaller k and v in another, gate and up together.
    assert found == {"32x32": 6, "16x32": 6, "64x32": 6, "32x64": 3, "total": 21}


def test_ranks_say_what_each_process_holds(own_model: str, tmp_path: Path) -> None:
    arguments = [own_model, "--target", "q_proj", "--rank", "2", "--ranks", "4", "--flops", "1e9", "--bandwidth", "1e6"]
    content = json.loads(run(*arguments, "--json", "-").stdout)
    assert [(r["method"], r["layout"]) for r in content["ranks"]] == [
        ("tcur", "ddp"), ("tcur", "fsdp"), ("lora", "ddp"), ("lora", "fsdp"),
    ]  # fmt: skip
    ddp, fsdp = content["ranks"][:2]
    assert (ddp["base"], fsdp["base"]) == (4 * 2 * 72, 2 * 72)
    assert ddp["transfer_s"] == pytest.approx(ddp["gradients"] / 1e6)
    assert content["rates"] == {"flops": 1e9, "bandwidth": 1e6}
    shown = run(*arguments).output
    assert "On 4 processes" in shown
    assert "not a measurement" in shown
    assert "ranks" not in json.loads(run(own_model, "--target", "q_proj", "--rank", "2", "--json", "-").stdout)


WRONG = {
    "unknown preset": (
        ["nonet"],
        "model: found 'nonet', expected unetr, swinunetr, vit, dynunet, segresnet, a folder or",
    ),
    "no such folder": (["no/such/folder"], "no/such/folder: no such file or folder; expected unetr"),
    "bad json": (["unetr", "--kwargs", "{"], "kwargs: found '{', expected a JSON object"),
    "json list": (["unetr", "--kwargs", "[1]"], "kwargs: found '[1]', expected a JSON object"),
    "unknown size": (["unetr", "--kwargs", '{"depth": 3}'], "kwargs of unetr: found depth, expected among in_channels"),
    "bad roi": (
        ["unetr", "--kwargs", '{"roi": 33}'],
        "roi of unetr: found 33x33x33, expected positive multiples of 16",
    ),
    "rank too large": (
        ["unetr", "--kwargs", SMALL, "--rank", "49"],
        "rank (c, r) = (49, 49) does not fit 96 x 48 weights: expected c <= 48 and r <= 96",
    ),
    "rank no number": (
        ["unetr", "--kwargs", SMALL, "--rank", "x"],
        "rank: found 'x', expected a positive whole number",
    ),
    "rank zero": (["unetr", "--kwargs", SMALL, "--rank", "0"], "rank is 0, expected a positive whole number"),
    "transform": (["unetr", "--kwargs", SMALL, "--transform", "fft"], "transform is 'fft', expected one of 'dft'"),
    "dtype": (["unetr", "--kwargs", SMALL, "--dtype", "int8"], "dtype: found 'int8', expected one of float32"),
    "split": (["unetr", "--kwargs", SMALL, "--split", "qkv"], "split: found 'qkv', expected NAME=N such as qkv=3"),
    "rank pattern": (
        ["unetr", "--kwargs", SMALL, "--rank-pattern", "linear1"],
        "rank-pattern: found 'linear1', expected NAME=R or NAME=C,R",
    ),
    "rank pattern that meets nothing": (
        ["unetr", "--kwargs", SMALL, "--rank-pattern", "fc1=2"],
        "rank_pattern 'fc1' matches none of the 48 adapted modules",
    ),
    "uneven split": (["unetr", "--kwargs", SMALL, "--split", "qkv=5"], "144 output features do not split into 5 equal"),
    "tokens": (["unetr", "--kwargs", SMALL, "--tokens", "0"], "tokens is 0, expected a positive whole number"),
    "batch": (["unetr", "--kwargs", SMALL, "--batch", "0"], "batch: found 0, expected a positive whole number"),
    "lora rank": (["unetr", "--kwargs", SMALL, "--lora-rank", "0"], "lora_rank is 0, expected a positive whole number"),
    "ranks": (["unetr", "--kwargs", SMALL, "--ranks", "0"], "ranks is 0, expected a positive whole number"),
    "flops": (["unetr", "--ranks", "2", "--flops", "-1"], "flops is -1.0, expected a positive number per second"),
    "rates without ranks": (["unetr", "--flops", "1e9"], "found --flops or --bandwidth without --ranks"),
    "nothing matched": (["unetr", "--kwargs", SMALL, "--target", "nothing"], "match none of the"),
    "bad regex": (["unetr", "--kwargs", SMALL, "--target-regex", "("], "target-regex: found '(', expected a regular"),
    "both targets": (["unetr", "--target", "qkv", "--target-regex", "x"], "found both --target and --target-regex"),
    "no module": (["nopackage:f"], "model: found no module 'nopackage' for 'nopackage:f'"),
    "no attribute": (["own_networks:g"], "own_networks has no function or class 'g'"),
    "no function": (["own_networks:value"], "own_networks has no function or class 'value'"),
    "wrong arguments": (["own_networks:Net", "--kwargs", '{"size": 1}'], "kwargs: own_networks:Net does not take"),
    "no model": (["own_networks:not_a_model"], "own_networks:not_a_model returned a int, expected a torch.nn.Module"),
    "constructor": (
        ["own_networks:broken"],
        "error: own_networks:broken: the model cannot be built (RuntimeError: no model)\n",
    ),
    "constructor of a preset": (["vit", "--kwargs", '{"num_layers": "x"}'], "vit: the model cannot be built with {"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_error_and_leaves_nothing(
    arguments: list[str], message: str, own_model: str, tmp_path: Path
) -> None:
    pytest.importorskip("monai")
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    done = run(*arguments, "--json", "plan.json", "--csv", "plan.csv")
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


@pytest.mark.parametrize("content", ["{", '{"model_type": "nothing-known"}', "[]"])
def test_a_damaged_transformers_configuration(content: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    done = run(str(tmp_path))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: {tmp_path / 'config.json'}: found no transformers configuration")


def test_a_configuration_that_no_model_can_be_built_from(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 60}))
    done = run(str(tmp_path))
    assert done.exit_code == 2, done.output
    assert done.stderr == (
        f"error: {file}: the model cannot be built (AssertionError: Padding_idx must be within num_embeddings)\n"
    )


def test_a_missing_optional_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "monai" else found(name, *rest)
    )
    done = run("unetr")
    assert done.exit_code == 2
    assert "pip install 'tcurlora_ext[segmentation]'" in done.stderr
