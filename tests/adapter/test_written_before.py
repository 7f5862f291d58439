"""Adapter files that version 0.1 wrote, one of each kind, still load: what they hold to the bit, outputs to rounding.

tests/data/adapters has the files, and ``outputs.npz`` what version 0.1 computed with each of them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.files import read_adapter, save_adapter
from tcurlora_ext.io.tensors import read_tensors

FILES = Path(__file__).parents[1] / "data" / "adapters"
KINDS = sorted(path.stem for path in FILES.glob("*.safetensors"))
OUTPUTS = dict(numpy.load(FILES / "outputs.npz"))


def _golden_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_model", Path(__file__).with_name("golden_model.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _golden_model()


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bfloat16" else torch.float32


def test_there_is_a_file_of_each_kind() -> None:
    assert len(KINDS) == 14
    assert set(OUTPUTS) == {*KINDS, "peft", "peft-indices"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_output_that_it_gave(kind: str) -> None:
    dtype = dtype_of(kind)
    model = tcur.load_adapter(golden.network(dtype), FILES / f"{kind}.safetensors")
    with torch.no_grad():
        found = model(golden.inputs().to(dtype)).float()
        plain = golden.network(dtype)(golden.inputs().to(dtype)).float()
    expected = torch.from_numpy(OUTPUTS[kind])
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(found, expected, rtol=rounding, atol=rounding)
    assert (found - plain).norm() > 3 * rounding * plain.norm()  # the adapter does something to be seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_held_to_the_bit_and_written_again_the_same(kind: str, tmp_path: Path) -> None:
    path = FILES / f"{kind}.safetensors"
    model = tcur.load_adapter(golden.network(dtype_of(kind)), path)
    header, tensors = read_tensors(path, "an adapter")
    for name, stack in tcur.stacks(model).items():
        for part in ("core", "rows", "columns", "col", "row"):
            if f"{part}.{name}" in tensors:
                assert torch.equal(getattr(stack, part), tensors[f"{part}.{name}"]), (name, part)
        assert stack.scale == read_adapter(path).stacks[name]["scale"]
    again = save_adapter(model, tmp_path / "again.safetensors", include_factors=kind == "with-factors")
    new_header, new_tensors = read_tensors(again, "an adapter")
    assert tensors.keys() == new_tensors.keys()
    for name, value in tensors.items():
        assert value.dtype == new_tensors[name].dtype, name
        assert torch.equal(value, new_tensors[name]), name
    before, after = (json.loads(h["tcurlora"]) for h in (header, new_header))
    prints = [[one.pop("fingerprint") for one in h["stacks"].values()] for h in (before, after)]
    assert after.pop("digest")
    assert "digest" not in before
    assert before == after
    saved, found = (torch.tensor([row for stack in p for row in stack], dtype=torch.float64) for p in prints)
    assert_close(found, saved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["peft", "peft-indices"])
def test_a_checkpoint_of_peft_gives_the_output_that_it_gave(kind: str) -> None:
    peft = pytest.importorskip("peft")
    import tcurlora_ext.integrations.peft  # noqa: F401  registers the method

    model = peft.PeftModel.from_pretrained(golden.network(), FILES / kind).eval()
    with torch.no_grad():
        assert_close(model(golden.inputs()), torch.from_numpy(OUTPUTS[kind]), rtol=1e-5, atol=1e-5)
    _, tensors = read_tensors(FILES / kind / "adapter_model.safetensors", "a checkpoint")
    for name, stack in model.base_model.stacks("default").items():
        assert torch.equal(stack.core, tensors[f"base_model.tcurlora_core.{name}"])
        assert torch.equal(stack.rows, tensors[f"base_model.tcurlora_rows.{name}"])
