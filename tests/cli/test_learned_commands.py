"""`tcurlora inspect`, `merge`, `to-lora` and `plan` with learned factors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import tcurlora_ext as tcur
from tcurlora_ext.cli.app import app

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(width, width)})}) for _ in "ab"
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"]["fc1"](x).tanh()
        return x
"""
X = torch.linspace(-3, 3, 5 * 16).view(5, 16).sin()


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def step(model: nn.Module) -> Tensor:
    return (model(X) - X.flip(0)).square().mean()


@dataclass(frozen=True)
class Made:
    """Files of one adapter over a subspace, and its base."""

    folder: Path
    subspace: tcur.Subspace
    model: nn.Module

    @property
    def on_base(self) -> list[str]:
        return ["--model", "learned_networks:Net", "--weights", str(self.folder / "base.safetensors")]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    (tmp_path / "learned_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import learned_networks

    torch.manual_seed(0)
    base = learned_networks.Net()
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base.safetensors")
    subspace = tcur.learn_factors(base, tcur.TCURConfig.preset("learned", rank=2), step, steps=4)
    subspace.save(tmp_path / "subspace.safetensors")
    model = tcur.inject(base, subspace=subspace)
    for stack in tcur.stacks(model).values():
        nn.init.normal_(stack.core)
    tcur.save_adapter(model, tmp_path / "whole.safetensors")
    tcur.save_adapter(model, tmp_path / "cores.safetensors", include_subspace=False)
    return Made(tmp_path, subspace, model)


def written(folder: Path) -> dict[str, object]:
    return json.loads((folder / "inspection.json").read_text())


def test_inspect_a_subspace(made: Made) -> None:
    done = call("inspect", "subspace.safetensors", "--no-pictures", "--output", "out")
    assert done.exit_code == 0, done.output
    assert f"subspace {made.subspace.digest[:12]}, in 2 bits, 2 stacks" in done.output
    assert "a warm-up of the whole weights, steps 4" in done.output
    losses = [made.subspace.about[f"{name} loss"] for name in ("first", "last")]
    assert "tasks 1, parts 1, first loss {:.4g}, last loss {:.4g}\n".format(*losses) in done.output
    assert "layers.1.mlp.fc1" in done.output
    assert "cosine" not in done.output
    content = written(made.folder / "out")
    assert content["stacks"] == []
    assert content["subspace"]["digest"] == made.subspace.digest
    done = call("inspect", "subspace.safetensors", *made.on_base, "--no-pictures", "--output", "out")
    assert done.exit_code == 0, done.output
    assert "cosine, left" in done.output
    for one in written(made.folder / "out")["subspace"]["stacks"]:
        assert 0 < one["left_cosines"][0] <= 1
        assert 0 < one["right_cosines"][0] <= 1


def test_inspect_adapters_over_one(made: Made) -> None:
    pytest.importorskip("matplotlib")
    alone = call("inspect", "whole.safetensors", "--output", "alone")
    assert alone.exit_code == 0, alone.output
    assert "input feature" not in alone.output
    assert "identity, learned factors, scale " in alone.output
    assert "selection" not in alone.output
    assert f"subspace {made.subspace.digest[:12]}" in alone.output
    assert not list((made.folder / "alone").glob("*_scores.png"))
    for name, more in (("whole", []), ("cores", ["--subspace", "subspace.safetensors"])):
        done = call("inspect", f"{name}.safetensors", *more, *made.on_base, "--no-pictures", "--output", name)
        assert done.exit_code == 0, done.output
        assert "|dW|" in done.output
        assert "cosine, left" in done.output
    whole, cores = (written(made.folder / name) for name in ("whole", "cores"))
    assert whole["stacks"] == cores["stacks"]
    assert whole["subspace"] == cores["subspace"]
    norms = [s.delta_weights().detach().norm(dim=(1, 2)).tolist() for s in tcur.stacks(made.model).values()]
    found = [stack["base"]["delta_norms"] for stack in whole["stacks"]]
    assert found == [pytest.approx(norm, rel=1e-5) for norm in norms]


def test_merge_and_to_lora(made: Made) -> None:
    import learned_networks

    subspace = ["--subspace", "subspace.safetensors"]
    for name, more in (("whole", []), ("cores", subspace)):
        done = call("merge", f"{name}.safetensors", *more, *made.on_base, "--output", f"{name}.merged.safetensors")
        assert done.exit_code == 0, done.output
        plain = learned_networks.Net()
        plain.load_state_dict(safetensors.torch.load_file(f"{name}.merged.safetensors"))
        torch.testing.assert_close(plain(X), made.model(X), rtol=1e-5, atol=1e-6)
        done = call("to-lora", f"{name}.safetensors", *more, *made.on_base, "--output", f"{name}_lora")
        assert done.exit_code == 0, done.output
        assert "LoRA adapter of rank 2" in done.output


def test_what_is_missing_or_wrong_is_said(made: Made) -> None:
    other = tcur.Subspace(made.subspace.config, made.subspace.bits, made.subspace.stacks, {"another": "note"})
    other.save("other.safetensors")
    digests = made.subspace.digest[:12], other.digest[:12]
    for arguments, message in (
        (("inspect", "cores.safetensors"), "for a command, --subspace FILE"),
        (
            ("inspect", "cores.safetensors", "--subspace", "other.safetensors"),
            "over the subspace {}, found {}".format(*digests),
        ),
        (("merge", "whole.safetensors", "--output", "m.safetensors"), "expected --model and --weights"),
        (
            ("merge", "subspace.safetensors", *made.on_base, "--output", "m.safetensors"),
            "found the file of a subspace, expected an adapter over it",
        ),
        (("inspect", "subspace.safetensors", "--subspace", "subspace.safetensors"), "expected an adapter with"),
        (("inspect", "whole.safetensors", "--subspace", "missing.safetensors"), "no such file of a subspace"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr


def test_plan_counts_files_and_the_warm_up(made: Made) -> None:
    done = call("plan", "learned_networks:Net", "--preset", "learned", "--rank", "2", "--json", "plan.json")
    assert done.exit_code == 0, done.output
    assert "Adam, in 4 parts" in done.output
    assert "subspace in 2 bits: a file of" in done.output
    content = json.loads(Path("plan.json").read_text())
    assert content["config"]["factors"] == "learned"
    for key, name in (("adapter_file", "whole"), ("cores_file", "cores"), ("subspace_file", "subspace")):
        assert content["learned"][key] == pytest.approx(Path(f"{name}.safetensors").stat().st_size, rel=0.03)
    assert content["learned"]["warmups"]["Adam, all layers at once"]["moments"] == 2 * 4 * 2 * 16 * 16
    done = call(
        "plan", "learned_networks:Net", "--factors", "learned_rows", "--orthonormal", "--bits", "1", "--parts", "1"
    )
    assert done.exit_code == 0, done.output
    assert "subspace in 1 bits" in done.output
    assert (
        "parts" not in done.output.replace("copies of the weights", "").split("subspace in")[1].split("warm-up of")[0]
    )
    assert call("plan", "learned_networks:Net", "--bits", "3").exit_code == 2
    plain = call("plan", "learned_networks:Net", "--json", "-")
    assert "learned" not in json.loads(plain.stdout)
