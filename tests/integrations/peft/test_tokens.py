"""Tokens and embeddings that train besides the cores, and weights that are tied to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tcurlora_ext.integrations.peft import TcurLoraConfig

Same = Callable[[Tensor, Tensor], None]
TOKENS = [5, 6]


def make(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def train(model: PeftModel, tokens: Tensor) -> PeftModel:
    """One step, large enough to change the output visibly."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()(tokens).logits.square().sum().backward()
    with torch.no_grad():
        for p in trained:
            assert bool(p.grad.any())
            p.sub_(0.1 * p.grad)
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 8, (3, 5))


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_train_load_and_merge(tied: bool, tokens: Tensor, assert_same: Same, tmp_path: Path) -> None:
    config = TcurLoraConfig(r=2, init_weights=False, trainable_token_indices=TOKENS, ensure_weight_tying=tied)
    model = train(get_peft_model(make(tied), config), tokens)
    delta = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "tcurlora" not in name} == {delta}

    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(make(tied), tmp_path).eval()(tokens).logits, expected)

    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert (type(plain.model.embed_tokens), type(plain.lm_head)) == (nn.Embedding, nn.Linear)
    changed = (plain.model.embed_tokens.weight != make(tied).model.embed_tokens.weight).any(1)
    assert changed.nonzero().flatten().tolist() == TOKENS
    assert torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight) == tied


def test_trainable_tokens_are_taken_by_row_in_a_mixed_batch(tokens: Tensor) -> None:
    model = get_peft_model(make(False), TcurLoraConfig(r=2, init_weights=False, trainable_token_indices=TOKENS))
    train(model, tokens)
    model.add_adapter("second", TcurLoraConfig(r=2, init_weights=False, trainable_token_indices=[7]))
    model.set_adapter("second")
    train(model, tokens)
    names = ["default", "second", "__base__"]
    mixed = model(tokens, adapter_names=names).logits
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(tokens).logits[row], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[2], make(False)(tokens).logits[2], rtol=1e-5, atol=1e-6)


def test_a_saved_module_and_what_is_tied_to_it_are_one(tokens: Tensor, assert_same: Same, tmp_path: Path) -> None:
    def weights(model: PeftModel) -> list[nn.Parameter]:
        inner = model.base_model.model
        return [m.modules_to_save["default"].weight for m in (inner.lm_head, inner.model.embed_tokens)]

    config = TcurLoraConfig(r=2, modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = train(get_peft_model(make(True), config), tokens)
    assert weights(model)[0] is weights(model)[1]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(True), tmp_path).eval()
    assert weights(loaded)[0] is weights(loaded)[1]
    assert_same(loaded(tokens).logits, model(tokens).logits)
