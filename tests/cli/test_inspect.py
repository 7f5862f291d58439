"""`tcurlora inspect` on a run folder and on an adapter file, and the wrong input that it refuses as `merge` does."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tcurlora_ext as tcur
from tcurlora_ext.cli.inspect import _show

from .adapted_run import KWARGS, SIZES, Run, call, files

pytest.importorskip("monai")
networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
methods = pytest.importorskip("tcurlora_ext.segmentation.methods")
run_module = pytest.importorskip("tcurlora_ext.segmentation.runs.network")

PICTURES = [
    f"{stack}_{kind}.png" for stack in ("24x24", "24x48", "48x24") for kind in ("frequencies", "layers", "scores")
]


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_a_run(run: Run) -> None:
    done = call("inspect", run.folder)
    assert done.exit_code == 0, done.output
    for name, stack in tcur.stacks(run.network()).items():
        assert f"stack {name}: {stack.slices} slices" in done.output
        assert all(slice_name in done.output for slice_name in stack.names)
    assert "vit.blocks.2.attn.qkv[1]" in done.output
    found = sorted(path.name for path in (run.adapter.parent / "inspect").iterdir())
    assert found == sorted([*PICTURES, "inspection.json"])
    for name in PICTURES:
        assert (run.adapter.parent / "inspect" / name).read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_the_numbers(run: Run, tmp_path: Path) -> None:
    call("inspect", run.folder, "--output", tmp_path / "out", "--no-pictures", "--stack", "24x24")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inspection.json"]
    (found,) = json.loads((tmp_path / "out" / "inspection.json").read_text())["stacks"]
    stack = tcur.stacks(run.network())["24x24"]
    assert found["columns"] == stack.columns.tolist()
    assert found["rows"] == stack.rows.tolist()
    norms = stack.delta_weights(dtype=torch.float64).detach().norm(dim=(1, 2))
    assert found["base"]["delta_norms"] == pytest.approx(norms.tolist(), rel=1e-5)
    assert sum(found["base"]["delta_energy"]) == pytest.approx(float(norms.square().sum()), rel=1e-5)


def test_inspect_an_adapter_file_with_its_base_says_the_same(run: Run, tmp_path: Path) -> None:
    call("inspect", run.folder, "--no-pictures")
    done = call("inspect", run.adapter, *run.on_base, "--no-pictures", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    of_run = json.loads((run.adapter.parent / "inspect" / "inspection.json").read_text())
    of_file = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert of_file["stacks"] == of_run["stacks"]


def test_inspect_an_adapter_file_alone(run: Run, tmp_path: Path) -> None:
    done = call("inspect", run.adapter.parent, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "input feature" in done.output
    assert "|U|" in done.output
    assert "|dW|" not in done.output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == sorted(PICTURES)


def test_inspect_of_files_does_not_replace_what_it_wrote_of_others(run: Run) -> None:
    folder = run.adapter.parent
    shutil.copy(run.adapter, folder / "other.safetensors")
    for source in (run.folder, run.adapter, folder / "other.safetensors"):
        assert call("inspect", source, "--no-pictures").exit_code == 0
    found = {path.relative_to(folder / "inspect").as_posix() for path in folder.rglob("inspection.json")}
    assert found == {"inspection.json", "adapter/inspection.json", "other/inspection.json"}


def test_the_picture_of_frequencies_is_whole_and_a_single_slice_has_none(run: Run) -> None:
    pytest.importorskip("matplotlib")
    from tcurlora_ext.adapter.files.format import read_adapter
    from tcurlora_ext.analysis.inspection import inspect_file
    from tcurlora_ext.cli.pictures import draw

    one = inspect_file(read_adapter(run.adapter))[0]
    figure = dict(draw(one))["frequencies"]
    figure.canvas.draw()
    label = figure.axes[0].xaxis.label.get_window_extent()
    assert 0 <= label.x0 < label.x1 <= figure.bbox.x1
    single = replace(one, names=one.names[:1], core_norms=one.core_norms[:1], core_energy=one.core_energy[:1])
    assert "frequencies" not in dict(draw(single))
    capture = Console(file=io.StringIO(), width=200)
    _show(single, capture)
    assert "frequency" not in capture.file.getvalue()  # type: ignore[attr-defined]


# -- wrong input ------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def wrong_cases(run: Run, tmp_path: Path) -> dict[str, tuple[list[str | Path], str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "foreign.safetensors").write_bytes(run.base.read_bytes())
    shutil.copy(run.adapter, tmp_path / "truncated.safetensors")
    truncate(tmp_path / "truncated.safetensors")
    other = json.dumps(SIZES | {"roi": 16, "hidden_size": 32})
    other_base = tmp_path / "other.safetensors"
    model = networks.build_network(networks.NetworkConfig("vit", 1, 2, (16, 16, 16), None, SIZES), seed=5)
    networks.save_weights(model, other_base)
    vit: list[str | Path] = ["--model", "vit", "--kwargs", KWARGS, "--weights"]
    return {
        "no such folder": ([tmp_path / "nothing"], "no such file or folder; expected a run of finetune or an adapter"),
        "empty folder": ([empty], "found neither network.json nor adapter.safetensors in this folder"),
        "truncated": ([tmp_path / "truncated.safetensors"], "found no whole safetensors file, expected an adapter"),
        "foreign": ([tmp_path / "foreign.safetensors"], "found a safetensors file without a 'tcurlora' header"),
        "no such seed": ([run.folder, "--seed", "3"], "seed3/adapter.safetensors: no such file; expected the adapter"),
        "unknown method": ([run.folder, "--method", "magic"], "method: found 'magic', expected each once of"),
        "model alone": ([run.adapter, "--model", "vit"], "found --model without --weights, expected both, or neither"),
        "weights alone": ([run.adapter, "--weights", run.base], "found --weights without --model, expected both"),
        "run and model": ([run.folder, *vit, run.base], "a run folder holds its base, expected no --model"),
        "no weights": ([run.adapter, *vit, tmp_path / "no.safetensors"], "no.safetensors: no such file"),
        "weights folder": ([run.adapter, *vit, empty], "found no *.safetensors in this folder"),
        "other sizes": (
            [run.adapter, "--model", "vit", "--kwargs", other, "--weights", run.base],
            "base.safetensors: weights do not fit vit: ",
        ),
        "other base": ([run.adapter, *vit, other_base], "trained on other base weights"),
        "bad json": ([run.adapter, "--kwargs", "{"], "kwargs: found '{', expected a JSON object"),
    }


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_wrong_input_is_one_error_and_leaves_nothing(command: str, run: Run, tmp_path: Path) -> None:
    output = tmp_path / ("out" if command == "inspect" else "out.safetensors")
    cases = wrong_cases(run, tmp_path)
    before = files(tmp_path)
    for name, (arguments, message) in cases.items():
        done = call(command, *arguments, "--output", output)
        assert done.exit_code == 2, (name, done.output, done.exception)
        assert done.stderr.startswith("error: "), name
        assert message in done.stderr, name
        assert files(tmp_path) == before, name


def test_a_method_without_stacks_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_adapted", lambda *_: run_module.load_base(run.folder))
    done = call("inspect", run.folder, "--method", "head")
    assert done.exit_code == 2
    assert "method 'head' has no stacks of tCUR, expected a method such as 'tcur'" in done.stderr


def test_the_only_method_of_tcur_is_taken_and_several_are_listed(run: Run) -> None:
    names = ["head", "tcur:rank=2"]
    settings = {"methods": names, "factors": None}
    description = {"command": "finetune", "settings": settings, "data": {"labels": {"0": "background", "1": "x"}}}
    (run.folder / "run.json").write_text(json.dumps(description))
    (run.folder / "tcur").rename(run.folder / "tcur_rank=2")
    (run.folder / "tcur_rank=2" / "seed0" / "result.json").write_text("{}")
    (run.folder / "head" / "seed0").mkdir(parents=True)
    (run.folder / "head" / "seed0" / "result.json").write_text("{}")
    done = call("inspect", run.folder, "--no-pictures")
    assert done.exit_code == 0, done.output
    assert (run.folder / "tcur_rank=2" / "seed0" / "inspect" / "inspection.json").is_file()
    shutil.copytree(run.folder / "tcur_rank=2", run.folder / "tcur_rank=3")
    settings["methods"] = [*names, "tcur:rank=3"]
    (run.folder / "run.json").write_text(json.dumps(description))
    done = call("inspect", run.folder, "--no-pictures")
    assert done.exit_code == 2
    assert "found the methods tcur:rank=2, tcur:rank=3 of tCUR, expected --method with one of them" in done.stderr


def test_inspect_refuses_an_unknown_stack_and_a_file_as_folder(run: Run, tmp_path: Path) -> None:
    done = call("inspect", run.folder, "--stack", "7x7")
    assert (done.exit_code, "stack: found 7x7, expected among 48x24" in done.stderr) == (2, True)
    done = call("inspect", run.folder, "--output", run.base)
    assert (done.exit_code, "found a file, expected a folder" in done.stderr) == (2, True)
    assert not (run.adapter.parent / "inspect").exists()


def test_inspect_without_matplotlib_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    done = call("inspect", run.folder)
    assert done.exit_code == 2
    assert "'matplotlib' is not installed" in done.stderr
    assert "pip install 'tcurlora_ext[segmentation]'" in done.stderr
    assert not (run.adapter.parent / "inspect").exists()
