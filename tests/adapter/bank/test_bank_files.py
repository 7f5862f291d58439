"""Adapter files in a bank, files of many adapters, and which of them are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import BOTH, FORMS, Net, cores_for, filled, make, one_by_one, with_cores

EXACT = {"rtol": 1e-12, "atol": 1e-12}
both = pytest.mark.parametrize("form", BOTH)


def inputs(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, 8, dtype=torch.float64)


def saved(path: Path, form: str = "coupled", seed: int = 0, include_factors: bool = False, **options: Any) -> Path:
    model = with_cores(make(form, **options), None)
    for name, core in cores_for(model, seed).items():
        tcur.stacks(model)[name].core.data.copy_(core)
    return tcur.save_adapter(model, path, include_factors)


@pytest.mark.parametrize("form", FORMS)
def test_adapter_files_load_and_compute_what_they_did(form: str, tmp_path: Path) -> None:
    model = make(form)
    bank = tcur.AdapterBank(model)
    bank.load(saved(tmp_path / "liver.safetensors", form, 1))
    bank.load(saved(tmp_path / "other.safetensors", form, 2), "spleen")
    (tmp_path / "kidney").mkdir()
    bank.load(saved(tmp_path / "kidney", form, 3).parent)
    bank.load(saved(tmp_path / "with.safetensors", form, 0, include_factors=True))
    assert bank.names == ["liver", "spleen", "kidney", "with"]
    x = inputs(4)
    y = model(x, adapter_ids=["kidney", "liver", "spleen", "with"])
    assert_close(y, one_by_one(model, [3, 1, 2, 0], x), **EXACT)


@both
@pytest.mark.parametrize("pool", [None, "cpu"])
def test_a_file_of_many_adapters(form: str, pool: str | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if pool is None else {"pool": pool, "capacity": 2}
    bank = filled(make(form), 40, **options)
    bank.remove("7")
    path = bank.save(tmp_path / "new folder" / "many.safetensors")
    assert path.stat().st_size < 1.05 * 39 * sum(c.nbytes for c in bank.cores("0").values()) + 8192
    model = make(form)
    other = tcur.AdapterBank(model, **options)
    other.add("here")
    assert other.load_all(path) == [str(at) for at in range(40) if at != 7]
    x = inputs(2)
    assert_close(model(x, adapter_ids=["39", "8"]), one_by_one(model, [39, 8], x), **EXACT)
    with pytest.raises(ValueError, match="'0' is in the bank already"):
        other.load_all(path)
    assert len(other) == 40
    empty = tcur.AdapterBank(make(form)).save(tmp_path / "empty.safetensors")
    assert other.load_all(empty) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "inverse-norm", "scale": 1.0}, r"stack 8x8 has rows"),
        ({"rank": (2, 2)}, r"stack 8x8 has rank \(2, 2\)"),
        ({"alpha": 2.0}, r"stack 8x8 has scale"),
        ({"transform": "dct"}, r"stack 8x8 has transform 'dct'"),
        ({"core_domain": "slice"}, r"stack 8x8 has core domain 'slice'"),
        ({"frequencies": 2}, r"stack 8x8 has blocks 3"),
        ({"stack_by": "none"}, r"its stacks are"),
        ({"trainable": "all"}, r"stack 8x8 has other factors"),
    ],
    ids=str,
)
def test_files_of_other_adapters_are_refused_by_stack(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    here = {"scale": 1.0} if "selection" in options else {}
    bank = tcur.AdapterBank(make(**here))
    model = make(**options)
    for stack in tcur.stacks(model).values():
        if options.get("trainable") == "all":
            stack.col.data.mul_(2)
    with pytest.raises(ValueError, match=message):
        bank.load(tcur.save_adapter(model, tmp_path / "a.safetensors"))
    if options.get("trainable") != "all":
        many = tcur.AdapterBank(model).save(tmp_path / "many.safetensors")
        with pytest.raises(ValueError, match=message):
            bank.load_all(many)
    assert len(bank) == 0


def test_files_of_other_base_weights_are_refused(tmp_path: Path) -> None:
    other = make()
    with torch.no_grad():
        other.blocks[1].up.weight[0, 0] += 1e-3
    bank = tcur.AdapterBank(other)
    with pytest.raises(
        ValueError, match=r"other base weights: 1 of 2 slices of stack 16x8 differ, first blocks\.1\.up"
    ):
        bank.load(saved(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match=r"stack 16x8 differ"):
        bank.load_all(filled(make()).save(tmp_path / "many.safetensors"))


def test_what_trained_beside_the_cores_is_refused_by_name(tmp_path: Path) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.head = Net().double(), nn.Linear(8, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

    model = tcur.inject(WithHead(), tcur.TCURConfig(rank=2, target_modules=r"net\..*"))
    tcur.unfreeze(model, ["head"])
    path = tcur.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has head\.bias, head\.weight \(2 in all\) beside the cores"):
        tcur.AdapterBank(model).load(path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    bank = filled(make())
    path = bank.save(tmp_path / "many.safetensors")
    adapter = saved(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="tcurlora_bank"):
        bank.load_all(adapter)
    with pytest.raises(ValueError, match="without a 'tcurlora' header"):
        bank.load(path)
    for missing in (bank.load, bank.load_all):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            missing(tmp_path / "nowhere.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="another digest"):
        bank.load_all(tmp_path / "changed.safetensors")
    (tmp_path / "short.safetensors").write_bytes(content[:-50])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        bank.load_all(tmp_path / "short.safetensors")
    before = path.read_bytes()
    shutil.copy(path, tmp_path / "copy.safetensors")
    with torch.no_grad():
        bank.train(["0"])[0].fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        bank.save(path)
    assert path.read_bytes() == before
