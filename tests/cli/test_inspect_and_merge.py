"""`tcurlora inspect` and `tcurlora merge`, on a run folder, on an adapter file, and on wrong input."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import tcurlora_ext as tcur
from tcurlora_ext.cli.app import app
from tcurlora_ext.cli.inspect import _show

pytest.importorskip("monai")
networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
methods = pytest.importorskip("tcurlora_ext.segmentation.methods")
run_module = pytest.importorskip("tcurlora_ext.segmentation.runs.network")

SIZES = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 2, "features": 4}
KWARGS = json.dumps(SIZES | {"roi": 16})
PICTURES = [
    f"{stack}_{kind}.png" for stack in ("24x24", "24x48", "48x24") for kind in ("frequencies", "layers", "scores")
]


@dataclass(frozen=True)
class Run:
    """A run folder as finetune leaves it, and the adapted network it holds."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "tcur" / "seed0" / "adapter.safetensors"

    @property
    def base(self) -> Path:
        return self.folder / "base.safetensors"

    @property
    def on_base(self) -> list[str]:
        return ["--model", "vit", "--kwargs", KWARGS, "--weights", str(self.base)]

    def network(self) -> torch.nn.Module:
        return run_module.load_adapted(self.folder, "tcur", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = networks.NetworkConfig("vit", 1, 2, (16, 16, 16), None, SIZES)
    config.save(folder / "network.json")
    model = networks.build_network(config)
    networks.save_weights(model, folder / "base.safetensors")
    tcur.inject(model, tcur.TCURConfig(rank=(2, 3)))
    tcur.unfreeze(model, ["out"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-2)
    (folder / "tcur" / "seed0").mkdir(parents=True)
    tcur.save_adapter(model, folder / "tcur" / "seed0" / "adapter.safetensors")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(made, tmp_path / "run"))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


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


# -- merge ------------------------------------------------------------------------------------------------------------


def test_the_merged_file_is_a_plain_network_with_the_same_output(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "new" / "merged.safetensors"
    done = call("merge", run.folder, "--output", output)
    assert done.exit_code == 0, done.output
    adapted = run.network()
    plain = run_module.load_base(run.folder)
    plain.load_state_dict(networks.read_weights(output), strict=True)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), adapted(x), rtol=1e-4, atol=1e-5)
    assert "rounding loss" in done.output
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("float32", 1e-8, 1e-4), ("float16", 1e-4, 0.1), ("bfloat16", 1e-3, 1)]
)
def test_every_dtype_is_rounded_once_and_reported(
    run: Run, tmp_path: Path, dtype: str, low: float, high: float
) -> None:
    output = tmp_path / "merged.safetensors"
    done = call("merge", run.adapter, *run.on_base, "--output", output, "--dtype", dtype)
    assert done.exit_code == 0, done.output
    tensors = networks.read_weights(output)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {getattr(torch, dtype)}
    adapted = run.network()
    layer = adapted.get_submodule("vit.blocks.1.attn.qkv")
    exact = layer.weight_slices().flatten(0, 1).double() + layer.stack.delta_weights(
        layer.layer_slices.indices, torch.float64
    ).flatten(0, 1)
    torch.testing.assert_close(tensors["vit.blocks.1.attn.qkv.weight"], exact.to(getattr(torch, dtype)), rtol=0, atol=0)
    (line,) = (line for line in done.output.splitlines() if line.strip().startswith("24x24"))
    assert low < float(line.split()[2]) < high


def test_merge_writes_over_a_file_only_when_asked(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    output.write_text("precious")
    done = call("merge", run.folder, "--output", output)
    assert done.exit_code == 2
    assert f"{output}: the file exists; expected a new one, or --overwrite" in done.stderr
    assert output.read_text() == "precious"
    assert call("merge", run.folder, "--output", output, "--overwrite").exit_code == 0


def test_a_value_that_the_dtype_cannot_hold_is_named(run: Run, tmp_path: Path) -> None:
    tensors = networks.read_weights(run.base)
    from safetensors.torch import save_file

    tensors["decoder.0.weight"].fill_(1e6)
    save_file(tensors, run.base)
    output = tmp_path / "merged.safetensors"
    done = call("merge", run.folder, "--output", output, "--dtype", "float16")
    assert done.exit_code == 2
    assert "decoder.0.weight: the merged value is not finite in torch.float16" in done.stderr
    assert not output.exists()


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


def saved(run: Run, method: str, options: dict[str, float]) -> torch.nn.Module:
    """A network adapted by another method, whose file is in the run."""
    chosen, spec = methods.METHODS[method], networks.get_spec("vit")
    given = methods.MethodOptions(also_train="head", own=options)
    model = run_module.load_base(run.folder)
    chosen.prepare(model, spec, given, None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    (run.folder / method / "seed0").mkdir(parents=True)
    chosen.save(model, run.folder / method / "seed0" / "adapter.safetensors", given)
    return run_module.load_adapted(run.folder, method, 0)


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2}), ("lora-pt", {"rank": 2}), ("norms", {})])
def test_merge_folds_other_methods(method: str, options: dict[str, float], run: Run, tmp_path: Path) -> None:
    expected, plain = saved(run, method, options), run_module.load_base(run.folder)
    done = call("merge", run.folder, "--method", method, "--output", tmp_path / "m.safetensors")
    assert done.exit_code == 0, done.output
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"))
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(image), expected.eval()(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 1e-9, 1e-5), ("bfloat16", 1e-3, 1)])
def test_merge_reports_the_rounding_of_other_methods(
    dtype: str, low: float, high: float, run: Run, tmp_path: Path
) -> None:
    adapted, base = saved(run, "lora", {"rank": 2}).double(), run_module.load_base(run.folder).state_dict()
    done = call("merge", run.folder, "--method", "lora", "--dtype", dtype, "--output", tmp_path / "m.safetensors")
    assert done.exit_code == 0, done.output
    assert "in tensor" in done.output
    methods.METHODS["lora"].merge(adapted)
    merged, losses = load_file(tmp_path / "m.safetensors"), {}
    for name, value in adapted.state_dict().items():
        if not torch.equal(value, base[name].double()):
            assert torch.equal(merged[name], value.to(merged[name].dtype))
            losses[name] = float((merged[name].double() - value).norm() / (value - base[name]).norm())
    (line,) = (line.split() for line in done.output.splitlines() if line.strip().startswith("lora "))
    assert line[1] == str(len(losses))
    assert low < float(line[3]) < high
    assert float(line[3]) == pytest.approx(max(losses.values()), rel=1e-2)
    assert losses[line[4]] == max(losses.values())


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("adapter", {"width": 2}, "adds layers that no weights"),
        ("ssf", {}, "has vit.blocks.0.attn.qkv.bias, which the"),
    ],
)
def test_merge_names_what_does_not_fold_into_weights(
    method: str, own: dict[str, int], message: str, run: Run, tmp_path: Path
) -> None:
    saved(run, method, own)
    done = call("merge", run.folder, "--method", method, "--output", tmp_path / "m.safetensors")
    assert done.exit_code == 2
    assert f"{method} {message}" in done.stderr
    assert not (tmp_path / "m.safetensors").exists()


def test_merge_needs_a_base(run: Run, tmp_path: Path) -> None:
    done = call("merge", run.adapter, "--output", tmp_path / "merged.safetensors")
    assert done.exit_code == 2
    assert "an adapter file alone holds no base weights, expected --model and --weights" in done.stderr
    assert not (tmp_path / "merged.safetensors").exists()


def test_merge_refuses_a_wrong_dtype_and_a_folder(run: Run, tmp_path: Path) -> None:
    done = call("merge", run.folder, "--output", tmp_path / "m.safetensors", "--dtype", "int8")
    assert (done.exit_code, "dtype: found 'int8', expected one of float32" in done.stderr) == (2, True)
    done = call("merge", run.folder, "--output", tmp_path)
    assert (done.exit_code, "found a folder, expected the name of a file" in done.stderr) == (2, True)


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


def test_a_transformers_model_with_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, architectures=["GPT2LMHeadModel"])
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    tcur.inject(model, tcur.TCURConfig(rank=2))
    for stack in tcur.stacks(model).values():
        torch.nn.init.normal_(stack.core)
    adapter = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    output = tmp_path / "merged.safetensors"
    base = tmp_path / "base"
    done = call("merge", adapter, "--model", base, "--weights", base, "--output", output)
    assert done.exit_code == 0, done.output
    plain = transformers.GPT2LMHeadModel(config)
    plain.load_state_dict(networks.read_weights(output), strict=True)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
