"""Mixed batches: every row is computed with its own adapter, as in a batch of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

Adapt = Callable[..., PeftModel]


@pytest.fixture
def model(make_llama: Callable[[], LlamaForCausalLM], adapt: Adapt) -> PeftModel:
    """Three adapters: two that share C and R, and one for other layers."""
    model = adapt(make_llama(), target_modules=["q_proj", "up_proj"])
    model.add_adapter("same", TcurLoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False))
    model.add_adapter("other", TcurLoraConfig(r=3, target_modules=["v_proj"], init_weights=False, transform="identity"))
    return model.eval()


def alone(model: PeftModel, adapter: str, tokens: Tensor) -> Tensor:
    if adapter == "__base__":
        with model.disable_adapter():
            return model(tokens).logits
    model.set_adapter(adapter)
    return model(tokens).logits


NAMES = ["same", "__base__", "default", "other", "same"]


def test_rows_are_those_of_separate_runs(model: PeftModel) -> None:
    tokens = torch.randint(3, 64, (5, 7))
    mixed = model(tokens, adapter_names=NAMES).logits
    for row, adapter in enumerate(NAMES):
        expected = alone(model, adapter, tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-5, atol=1e-6)
        for another in set(NAMES) - {adapter}:
            assert not torch.allclose(mixed[row : row + 1], alone(model, another, tokens[row : row + 1]), atol=1e-4)


def test_the_base_product_is_computed_once(model: PeftModel) -> None:
    calls: list[int] = []
    layer = next(module for module in model.modules() if isinstance(module, TcurLoraLinear))
    layer.base_layer.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    model(torch.randint(3, 64, (5, 7)), adapter_names=NAMES)
    assert calls == [5]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation(model: PeftModel, num_beams: int) -> None:
    tokens = torch.randint(3, 64, (5, 7))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    mixed = model.generate(input_ids=tokens, adapter_names=NAMES, **options)
    for row, adapter in enumerate(NAMES):
        if adapter != "__base__":
            model.set_adapter(adapter)
            assert torch.equal(mixed[row], model.generate(input_ids=tokens[row : row + 1], **options)[0]), adapter


def test_beams_are_not_repeated_in_an_encoder(adapt: Adapt) -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model = adapt(T5ForConditionalGeneration(config).eval(), target_modules=["q", "v"])
    model.add_adapter("second", TcurLoraConfig(r=2, target_modules=["q", "v"], init_weights=False))
    tokens, options = torch.randint(3, 64, (2, 7)), {"max_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=tokens, adapter_names=["second", "default"], **options)
    for row, adapter in enumerate(["second", "default"]):
        model.set_adapter(adapter)
        expected = model.generate(input_ids=tokens[row : row + 1], **options)[0]
        assert torch.equal(mixed[row][: len(expected)], expected)


def test_saved_modules_are_taken_by_row_too(make_llama: Callable[[], LlamaForCausalLM], adapt: Adapt) -> None:
    model = adapt(make_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    tokens = torch.randint(3, 64, (2, 7))
    mixed = model(tokens, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], alone(model, "default", tokens[:1]))
    torch.testing.assert_close(mixed[1:], alone(model, "__base__", tokens[1:]))
