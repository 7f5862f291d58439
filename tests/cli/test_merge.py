"""`tcurlora merge`, of tCUR and of other methods; wrong input that `inspect` has too is with that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tcurlora_ext as tcur

from .adapted_run import Run, call

pytest.importorskip("monai")
networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
methods = pytest.importorskip("tcurlora_ext.segmentation.methods")
run_module = pytest.importorskip("tcurlora_ext.segmentation.runs.network")


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
