"""`to_lora`: the LoRA adapter gives the adapted model's output, in PEFT and by a plain reading of the file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

from ..conftest import Network
from .written import PREFIX, Alike, assert_equal, config_of, in_peft, inject, served, tensors_of

peft = pytest.importorskip("peft")

# Options -> the expected LoRA rank: the largest of the modules'. The stacks by shape are 8x8 (q, k, v, out of two
# blocks; S = 8), 16x8 and 8x16 (S = 2).
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "coupled": ({}, 16),
    "core in slices": ({"core_domain": "slice"}, 16),
    "raw factors": ({"scale": 1.0}, 16),
    "dct": ({"transform": "dct"}, 16),
    "dropout": ({"dropout": 0.5}, 16),
    "all trained": ({"trainable": "all"}, 16),
    "frequencies": ({"frequencies": 2}, 6),
    "fewer columns": ({"rank": (1, 3), "target_modules": ["out_proj", "linear1", "linear2"]}, 2),
    "fewer columns, fused": ({"rank": (1, 8), "target_modules": ["qkv"]}, 3 * 6),
    "fewer columns, frequencies": ({"rank": (1, 8), "frequencies": 2, "target_modules": ["qkv"]}, 3 * 3),
    "own cores": ({"transform": "identity"}, 6),
    "own cores, fewer columns": ({"transform": "identity", "rank": (1, 3)}, 3),
    "stacks of one layer": ({"stack_by": "none"}, 6),
    "stacks of one block": ({"stack_blocks": 1}, 8),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_output_in_peft_and_by_a_plain_reading(
    form: str, base: Network, inputs: Tensor, tmp_path: Path
) -> None:
    options, rank = FORMS[form]
    model = inject(base, **options)
    expected = model(inputs)
    assert tcur.to_lora(model, tmp_path) == tmp_path
    assert not torch.allclose(base(inputs), expected, rtol=1e-2)
    assert_equal(in_peft(base, tmp_path)(inputs), expected)
    assert_equal(served(base, tmp_path)(inputs), expected)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert {value.shape[0] for name, value in tensors_of(tmp_path).items() if ".lora_A." in name} == {rank}
    assert {value.shape[1] for name, value in tensors_of(tmp_path).items() if ".lora_B." in name} == {rank}


def test_smaller_ranks_are_filled_with_zeros(base: Network, tmp_path: Path) -> None:
    tcur.to_lora(inject(base), tmp_path)
    tensors = tensors_of(tmp_path)
    A = tensors[f"{PREFIX}blocks.0.mlp.linear1.lora_A.weight"]
    B = tensors[f"{PREFIX}blocks.0.mlp.linear1.lora_B.weight"]
    assert not A[4:].any()
    assert not B[:, 4:].any()
    assert A[:4].any(1).all()
    assert B[:, :4].any(0).all()


def test_the_configuration_is_lora_for_inference(base: Network, tmp_path: Path) -> None:
    tcur.to_lora(inject(base), tmp_path)
    found = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, peft.LoraConfig)
    assert (found.bias, found.inference_mode, found.modules_to_save) == ("none", True, None)
    assert (found.fan_in_fan_out, found.lora_dropout, found.use_rslora) == (False, 0.0, False)
    names = [name for name, _ in base.named_modules() if name.endswith(("qkv", "out_proj", "linear1", "linear2"))]
    assert config_of(tmp_path)["target_modules"] == names
    assert config_of(tmp_path)["auto_mapping"] == {"base_model_class": "Network", "parent_library": Network.__module__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_of_16_bits_gets_factors_of_32(dtype: torch.dtype, inputs: Tensor, tmp_path: Path) -> None:
    base = Network().to(dtype).eval()
    model = inject(base)
    tcur.to_lora(model, tmp_path)
    assert {value.dtype for value in tensors_of(tmp_path).values()} == {torch.float32}
    # A and B are those of float64 to float32's rounding: about 2**-24 in each of 16 products of norm 1.
    wide = copy.deepcopy(model).double()  # the same factors and cores
    for name, layer in ((n, m) for n, m in wide.named_modules() if isinstance(m, tcur.TCURLinear)):
        A, B = (tensors_of(tmp_path)[f"{PREFIX}{name}.lora_{kind}.weight"].double() for kind in "AB")
        exact = layer.delta_weight().detach()
        assert float((B @ A - exact).norm() / exact.norm()) < 1e-6
    # Both models round activations to the dtype, at different places.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    x = inputs.to(dtype)
    assert_equal(in_peft(base, tmp_path)(x).float(), model(x).float(), tolerance)


@pytest.mark.parametrize("wrap", [lambda model: model, tcur.merge, torch.compile, nn.Sequential, nn.ModuleList])
def test_merged_and_wrapped_models_write_the_same_file(
    wrap: Callable[[Any], Any], base: Network, tmp_path: Path
) -> None:
    model = inject(base)
    tcur.to_lora(model, tmp_path / "plain")
    around = wrap([model]) if wrap is nn.ModuleList else wrap(model)
    tcur.to_lora(around, tmp_path / "wrapped")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_stored_factors_on_another_base(base: Network, inputs: Tensor, tmp_path: Path) -> None:
    tcur.save_adapter(inject(base), tmp_path / "adapter.safetensors", include_factors=True)
    torch.manual_seed(1)
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = copy.deepcopy(other)
    tcur.load_adapter(model, tmp_path / "adapter.safetensors")
    tcur.to_lora(model, tmp_path / "lora")
    assert_equal(in_peft(other, tmp_path / "lora")(inputs), model(inputs))


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_module_whose_name_ends_alike_stays_unadapted(inputs: Tensor, tmp_path: Path) -> None:
    base = Alike().double().eval()
    model = inject(base, target_modules="fc")
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "fc"  # a regex for the whole name, not a list
    loaded = in_peft(base, tmp_path)
    assert_equal(loaded(inputs), model(inputs))
    adapted = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [f"{PREFIX}fc"]


def test_items_of_a_sequential(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    base = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 6)).double()
    model = inject(base, target_modules=r"0|1\.2")
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == r"0|1\.2"
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_equal(in_peft(base, tmp_path)(x), model(x))


# -- the folder -------------------------------------------------------------------------------------------------------


def test_other_files_of_the_folder_stay_and_a_lora_adapter_is_replaced(base: Network, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    tcur.to_lora(inject(base), tmp_path)
    tcur.to_lora(inject(base, rank=1), tmp_path)
    assert config_of(tmp_path)["r"] == 8
    names = {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"peft_type": "TCURLORA"}', "[]", "{"])
def test_an_adapter_of_another_kind_is_not_replaced(content: str, base: Network, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds an adapter of kind (TCURLORA|None), whose files"):
        tcur.to_lora(inject(base), tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_place_of_the_folder(base: Network, tmp_path: Path) -> None:
    (tmp_path / "lora").write_text("mine")
    with pytest.raises(ValueError, match="found a file, expected a folder"):
        tcur.to_lora(inject(base), tmp_path / "lora")
    assert (tmp_path / "lora").read_text() == "mine"
