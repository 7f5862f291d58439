"""`to_lora` for models of transformers, adapted by `tcur.inject` and through PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

from . import small_models
from .entries import ENTRIES, Entry

peft = pytest.importorskip("peft")
from tcurlora_ext.integrations.peft import TcurLoraConfig  # noqa: E402


@pytest.fixture(params=ENTRIES)
def entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


def with_cores(entry: Entry, model: nn.Module) -> nn.Module:
    """Cores that change the output."""
    for stack in entry.stacks(model).values():
        stack.set_core_slices(0.1 * torch.randn(stack.slices, *stack.rank))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "CLIP"])
def test_a_lora_adapter_gives_the_same_output(kind: str, entry: Entry, tmp_path: Path) -> None:
    """In float64, so that only an error of the maths, a name or a layout could make a difference."""
    model = with_cores(entry, entry.adapt(small_models.base(kind).double(), rank=2)).eval()
    tcur.to_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_models.base(kind).double(), tmp_path)
    found, expected = (small_models.result(m, kind, torch.float64) for m in (loaded, model))
    base = small_models.result(small_models.base(kind).double(), kind, torch.float64)
    name = "logits" if "logits" in expected else "image_embeds"
    assert not torch.allclose(base[name], expected[name], rtol=1e-2)
    torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    assert config_of(tmp_path)["fan_in_fan_out"] == (kind == "GPT-2")


@pytest.mark.parametrize(("kind", "head"), [("BERT", "classifier"), ("Llama", "lm_head"), ("Llama", "model.norm")])
def test_a_head_or_a_norm_that_trains_beside(kind: str, head: str, entry: Entry, tmp_path: Path) -> None:
    model = with_cores(entry, entry.adapt(small_models.base(kind), head, rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() < 3:  # not the cores
            nn.init.normal_(parameter)
    tcur.to_lora(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == [head]
    loaded = peft.PeftModel.from_pretrained(small_models.base(kind), tmp_path)
    found, expected = (small_models.output(m, kind) for m in (loaded, model))
    # float32: two orders of the same sums in two blocks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_model_that_was_loaded_names_its_folder(entry: Entry, tmp_path: Path) -> None:
    folder = str(tmp_path / "base")
    small_models.base("Llama").save_pretrained(folder)
    transformers = small_models.transformers
    model = with_cores(entry, entry.adapt(transformers.AutoModelForCausalLM.from_pretrained(folder), rank=2))
    tcur.to_lora(model, tmp_path / "lora")
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] == folder
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(
        small_models.output(loaded, "Llama"), small_models.output(model, "Llama"), rtol=1e-4, atol=1e-4
    )


def test_names_and_shapes_are_those_of_a_lora_adapter_of_peft(entry: Entry, tmp_path: Path) -> None:
    model = with_cores(entry, entry.adapt(small_models.base("Llama"), rank=2))
    tcur.to_lora(model, tmp_path / "ours")
    config = config_of(tmp_path / "ours")
    lora = peft.LoraConfig(r=config["r"], target_modules=r".*_proj")
    peft.get_peft_model(small_models.base("Llama"), lora).save_pretrained(tmp_path / "theirs")
    assert config.keys() == config_of(tmp_path / "theirs").keys()
    ours, theirs = (
        {name: (value.shape, value.dtype) for name, value in safetensors.torch.load_file(file).items()}
        for file in (tmp_path / name / "adapter_model.safetensors" for name in ("ours", "theirs"))
    )
    assert ours == theirs


# -- PeftModels -------------------------------------------------------------------------------------------------------


def through_peft(**options: Any) -> Any:
    config = TcurLoraConfig(**({"r": 2, "init_weights": False} | options))
    return peft.get_peft_model(small_models.base("Llama").double(), config).eval()


def logits(model: nn.Module) -> Tensor:
    found: Tensor = small_models.result(model, "Llama").logits
    return found


def loaded_from(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(small_models.base("Llama").double(), folder).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "identity"},
        {"r": (1, 3), "save_projection": False},
        {"trainable_token_indices": [5, 6]},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"target_modules": "all-linear", "stack_by": "none"},
    ],
    ids=str,
)
def test_options_of_a_peft_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = through_peft(**options)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            nn.init.normal_(parameter)
    tcur.to_lora(model, tmp_path)
    torch.testing.assert_close(logits(loaded_from(tmp_path)), logits(model), rtol=1e-12, atol=1e-12)


def test_one_of_several_adapters_the_active_one_by_default(tmp_path: Path) -> None:
    model = through_peft()
    model.add_adapter("other", TcurLoraConfig(r=1, init_weights=False, target_modules=["q_proj"]))
    tcur.to_lora(model, tmp_path / "active")
    tcur.to_lora(model, tmp_path / "named", adapter_name="other")
    torch.testing.assert_close(logits(loaded_from(tmp_path / "active")), logits(model), rtol=1e-12, atol=1e-12)
    model.set_adapter("other")
    torch.testing.assert_close(logits(loaded_from(tmp_path / "named")), logits(model), rtol=1e-12, atol=1e-12)
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(2)]
    assert config_of(tmp_path / "named")["target_modules"] == names


def test_merged_and_wrapped(tmp_path: Path) -> None:
    model = through_peft()
    expected = logits(model)
    model.merge_adapter()
    tcur.to_lora(nn.Sequential(torch.compile(model)), tmp_path)
    torch.testing.assert_close(logits(loaded_from(tmp_path)), expected, rtol=1e-12, atol=1e-12)


def with_two_active(model: Any) -> Any:
    model.add_adapter("other", TcurLoraConfig(r=1))
    model.base_model.set_adapter(["default", "other"])
    return model


def with_a_trained_norm(model: Any) -> Any:
    model.base_model.model.model.norm.requires_grad_(True)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no such adapter": (through_peft, {"adapter_name": "mine"}, "adapter mine does not exist, expected one of default"),
    "two active": (lambda: with_two_active(through_peft()), {}, "default, other is active, expected adapter_name"),
    "biases": (lambda: through_peft(bias="all"), {}, r"trains biases \(bias='all'\)"),
    "a norm": (lambda: with_a_trained_norm(through_peft()), {}, r"model\.norm\.weight .*in modules_to_save"),
    "rank": (through_peft, {"max_rank": 3}, r"q_proj: the LoRA rank is 8, expected at most max_rank = 3"),
    "another method": (
        lambda: peft.get_peft_model(small_models.base("Llama"), peft.LoraConfig(target_modules=["q_proj"])),
        {},
        r"PeftModel is not adapted; call inject\(model\) first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tcur.to_lora(make(), tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_of_the_model_itself_is_not_replaced(tmp_path: Path) -> None:
    model = through_peft()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds an adapter of kind TCURLORA"):
        tcur.to_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
