"""Replacing a loaded adapter by a saved one, also in a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from tcurlora_ext.integrations.peft import hotswap_adapter

Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]

OTHERS = {
    "other values": {},
    "another scale": {"alpha": 3.0},
    "other indices": {"selection": "uniform"},
    "indices alone": {"selection": "norm-sampled", "seed": 3, "save_projection": False},
}


@torch.no_grad()
def test_a_compiled_model_computes_the_new_adapter_without_compiling_again(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    model = adapt(make_llama())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(input_ids=tokens).logits
    with torch.compiler.set_stance("fail_on_recompile"):
        for name, options in OTHERS.items():
            base = make_llama()
            torch.manual_seed(len(name))  # for a core of its own
            other = adapt(base, **options)
            other.save_pretrained(tmp_path / name)
            hotswap_adapter(compiled, tmp_path / name, "default")
            found = compiled(input_ids=tokens).logits
            torch.testing.assert_close(found, other(tokens).logits, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(found, before, atol=1e-4)
            before = found


def test_other_adapters_that_share_c_and_r_stay_as_they_are(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    model = adapt(make_llama())
    model.save_pretrained(tmp_path / "first")
    model.load_adapter(tmp_path / "first", "second")
    expected = model(tokens).logits
    adapt(make_llama(), selection="uniform").save_pretrained(tmp_path / "other")
    hotswap_adapter(model, tmp_path / "other", "default")
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-4)
    model.set_adapter("second")
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3}, r"tcurlora_core.16x16 has shape \(4, 3, 3\), expected \(4, 2, 2\)"),
        ({"target_modules": ["q_proj"]}, r"stack 16x16 has the layers .*o_proj.* in adapter default and"),
        ({"transform": "dct"}, "transform is 'dft' in adapter default and 'dct' in"),
        ({"scale": 1.0}, "scale is None in adapter default and 1.0 in"),
        ({"modules_to_save": ["lm_head"]}, "only one of the adapters has .*lm_head.weight"),
    ],
)
def test_an_adapter_that_is_not_alike_is_refused_and_changes_nothing(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    adapt(make_llama(), **options).save_pretrained(tmp_path)
    model = adapt(make_llama())
    expected = model(tokens).logits
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(tokens).logits, expected)


def test_indices_for_another_base_are_refused_and_change_nothing(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    """The last stack differs, so that the others have been checked before."""
    other = make_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.1)
    adapt(other, selection="uniform", save_projection=False).save_pretrained(tmp_path)
    model = adapt(make_llama())
    expected = model(tokens).logits
    with pytest.raises(ValueError, match="stack 16x32: trained on other base weights"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(tokens).logits, expected)


def test_another_method_another_name_and_a_merged_adapter_are_refused(
    make_llama: MakeLlama, adapt: Adapt, tmp_path: Path
) -> None:
    model = adapt(make_llama())
    model.save_pretrained(tmp_path / "own")
    get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is a LORA adapter, expected TCURLORA"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    with pytest.raises(ValueError, match="adapter defualt does not exist, expected one of default"):
        hotswap_adapter(model, tmp_path / "own", "defualt")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj holds adapter default merged, call unmerge_adapter\(\) first"):
        hotswap_adapter(model, tmp_path / "own", "default")
