"""`to_lora` of models in which more than the cores was trained: PEFT's modules_to_save, or a file of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

from ..conftest import Network
from ..small import Net
from .written import PREFIX, Alike, Tied, assert_equal, config_of, in_peft, inject, tensors_of, train_beside


def test_whole_modules_are_modules_to_save(base: Network, inputs: Tensor, tmp_path: Path) -> None:
    model = train_beside(inject(base), ["head", "norm"])
    model.train()(inputs)
    model.eval()
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["norm", "head"]
    assert f"{PREFIX}norm.running_mean" in tensors_of(tmp_path)
    assert_equal(in_peft(base, tmp_path)(inputs), model(inputs))


def test_what_trains_beside_goes_into_a_file_of_its_own(base: Network, inputs: Tensor, tmp_path: Path) -> None:
    plain, beside = copy.deepcopy(base), tmp_path / "beside.safetensors"
    with pytest.raises(ValueError, match="nothing was trained beside the cores"):
        tcur.to_lora(inject(copy.deepcopy(base)), tmp_path / "lora", beside=beside)
    model = train_beside(inject(base), ["norm", "head"])
    tcur.to_lora(model, tmp_path / "lora", beside=beside)
    assert config_of(tmp_path / "lora")["modules_to_save"] is None
    plain.load_state_dict(safetensors.torch.load_file(beside), strict=False)
    assert_equal(in_peft(plain, tmp_path / "lora")(inputs), model(inputs))


def test_a_module_that_trains_in_part_is_saved_whole(base: Network, inputs: Tensor, tmp_path: Path) -> None:
    model = train_beside(inject(base), ["head.bias"])
    tcur.to_lora(model, tmp_path)
    assert {name for name in tensors_of(tmp_path) if "lora" not in name} == {
        f"{PREFIX}head.{n}" for n in ("weight", "bias")
    }
    assert_equal(in_peft(base, tmp_path)(inputs), model(inputs))


def test_running_statistics_that_training_has_changed(tmp_path: Path) -> None:
    base = Net(affine=False).double()
    model = inject(base, target_modules=r"body\.\d")
    x = torch.randn(7, 8, dtype=torch.float64)
    tcur.to_lora(model, tmp_path / "before")
    assert config_of(tmp_path / "before")["modules_to_save"] is None
    model.train()(x)
    tcur.to_lora(model, tmp_path / "after")
    assert config_of(tmp_path / "after")["modules_to_save"] == ["norm"]
    assert_equal(in_peft(base, tmp_path / "after")(x), model.eval()(x))


def test_modules_whose_names_end_alike_go_into_the_file_as_they_are(inputs: Tensor, tmp_path: Path) -> None:
    """PEFT replaces every module whose name ends in "fc" by a copy: the file has the values of all of them."""
    base = Alike().double().eval()
    model = train_beside(inject(base, target_modules="part_fc"), ["fc"])
    with pytest.raises(
        ValueError, match=r"fc .*would also take part_fc, which it cannot: it belongs to an adapted layer"
    ):
        tcur.to_lora(model, tmp_path / "refused")
    base.part_fc = nn.Identity()  # type: ignore[assignment]
    base.last = nn.Linear(6, 6).double()
    model = train_beside(inject(base, target_modules="last"), ["fc"])
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["fc"]
    assert f"{PREFIX}part.fc.weight" in tensors_of(tmp_path)
    assert_equal(in_peft(base, tmp_path)(inputs), model(inputs))


def test_tied_weights_go_into_the_file_under_both_names(tmp_path: Path) -> None:
    base, ids = Tied().double(), torch.arange(9)
    model = train_beside(inject(base, target_modules=["body"]), ["embed"])
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["embed", "head"]
    assert_equal(in_peft(base, tmp_path)(ids), model(ids))


def test_warnings_are_those_of_a_saved_adapter(base: Network, tmp_path: Path) -> None:
    model = inject(base)
    with torch.no_grad():
        tcur.stacks(model)["8x8"].core.zero_()
    with pytest.warns(UserWarning, match=r"cores of 8x8 .* are still zero") as zero:
        tcur.to_lora(model, tmp_path)
    around = nn.Sequential(inject(base), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"1\.weight, 1\.bias .* are not in it") as others:
        tcur.to_lora(around, tmp_path)
    assert {warning.filename for warning in (*zero, *others)} == {__file__}
