"""`to_lora`: the LoRA adapter gives the adapted model's output, in PEFT and by a plain reading of the file."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

from .conftest import Network
from .small import Net

peft = pytest.importorskip("peft")
PREFIX = "base_model.model."

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


@pytest.fixture
def base() -> Network:
    return Network().double().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64)


def inject(base: nn.Module, **options: Any) -> nn.Module:
    """A copy of the base, adapted, with cores that change the output."""
    model = tcur.inject(copy.deepcopy(base), tcur.TCURConfig(**({"rank": 2} | options)))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.3 * torch.randn(stack.slices, *stack.rank))
    return model


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def served(base: nn.Module, folder: Path) -> nn.Module:
    """The base with y + B A x * alpha / r in every module that the file names: what an engine computes."""
    config, tensors = config_of(folder), tensors_of(folder)
    model = copy.deepcopy(base)
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            B = tensors[f"{PREFIX}{name}.lora_B.weight"]
            scaling = config["lora_alpha"] / config["r"]
            model.get_submodule(name).register_forward_hook(
                lambda _, x, y, A=A, B=B * scaling: y + x[0] @ A.T.to(y) @ B.T.to(y)
            )
    return model


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


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


class Alike(nn.Module):
    """The module ``fc`` beside ``part.fc`` and ``part_fc``, whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.part_fc = nn.Linear(6, 6), nn.Linear(6, 6)
        self.part = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        self.last: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part_fc(self.part["fc"](torch.tanh(self.fc(x)))))


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


# -- trained beside ---------------------------------------------------------------------------------------------------


def train_beside(model: nn.Module, patterns: list[str]) -> nn.Module:
    tcur.unfreeze(model, patterns)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "tcur_stacks" not in name:
            nn.init.normal_(parameter)
    return model


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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)) + self.shift)


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


# -- refusals ---------------------------------------------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    parameter = next(model.parameters())
    parameter.full_tensor = lambda: parameter.data  # as DTensors, which FSDP2 makes, are recognised
    return model


def at_two_places(model: nn.Module) -> nn.Module:
    model.again = model.get_submodule("blocks.0.mlp")._modules["linear1"]
    return model


def not_finite(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        tcur.stacks(model)["8x8"].core[0, 0, 0] = torch.nan
    return model


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any], str]] = {
    "rank": (
        lambda m: m,
        {"max_rank": 15},
        r"qkv: the LoRA rank is 16, expected at most max_rank = 15.*stack_bl",
    ),
    "no rank": (lambda m: m, {"max_rank": 0}, "max_rank is 0, expected a positive whole number"),
    "not adapted": (tcur.remove, {}, r"Network is not adapted; call inject\(model\) first"),
    "a part": (lambda m: m.get_submodule("blocks"), {}, "is a part of an adapted model"),
    "adapter_name": (
        lambda m: m,
        {"adapter_name": "default"},
        "expected None: Network has no adapters of PEFT",
    ),
    "bias": (
        lambda m: tcur.unfreeze(m, ["blocks.1.mlp.linear1.bias"]),
        {},
        r"blocks\.1\.mlp\.linear1\.bias was trained beside the cores.*belongs to an adapted layer",
    ),
    "sharded": (sharded, {}, r"embed\.weight is sharded over several processes; save the adapter"),
    "two places": (at_two_places, {}, r"again and blocks\.0\.mlp\.linear1 are one adapted module at two places"),
    "not finite": (not_finite, {}, r"lora_B.weight has NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_adapter_is_refused_and_nothing_written(case: str, base: Network, tmp_path: Path) -> None:
    change, options, message = REFUSED[case]
    model = change(inject(base))
    with pytest.raises(ValueError, match=message):
        tcur.to_lora(model, tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_the_model_itself_are_refused(tmp_path: Path) -> None:
    model = tcur.unfreeze(inject(Tied(), target_modules=["body"]), ["shift"])
    with pytest.raises(ValueError, match=r"shift was trained beside the cores.*belongs to the model itself"):
        tcur.to_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_peft_would_find_within_its_own_layers_is_refused(base: Network, tmp_path: Path) -> None:
    base.out = nn.Linear(3, 3).double()
    model = tcur.unfreeze(inject(base), ["out"])
    with pytest.raises(ValueError, match=r"out .*PEFT goes by the ends of names.* lora_dropout of its own layers"):
        tcur.to_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_parameters_around_adapted_layers_are_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({"inner": Tied()})
    model = tcur.unfreeze(inject(base, target_modules=["body"]), [r"inner\.shift"])
    with pytest.raises(ValueError, match=r"inner\.shift .*its module inner contains the adapted layer inner\.body"):
        tcur.to_lora(model, tmp_path / "lora")


def test_a_missing_peft_is_named(base: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="'peft' is not installed; expected it to write"):
        tcur.to_lora(inject(base), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


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
