"""Merging W + dW into the base layer, and restoring W."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

Same = Callable[[Tensor, Tensor], None]
Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]


def weights(model: nn.Module) -> list[Tensor]:
    """The present weights of the adapted layers."""
    return [m.get_base_layer().weight.clone() for m in model.modules() if isinstance(m, TcurLoraLinear)]


def test_merged_computes_the_same_and_unmerged_is_the_base_bit_for_bit(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same
) -> None:
    model = adapt(make_llama())
    model.add_adapter("second", TcurLoraConfig(r=3, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    before, expected = weights(model), model(tokens).logits
    for adapters in (["default"], ["second"]):
        model.merge_adapter(adapters)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()

    one_by_one = weights(model)
    model.unmerge_adapter()
    for now, then in zip(weights(model), before, strict=True):
        assert_same(now, then)
    assert_same(model(tokens).logits, expected)
    model.merge_adapter()
    for now, then in zip(weights(model), one_by_one, strict=True):
        assert_same(now, then)


def test_a_disabled_adapter_unmerges(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same) -> None:
    model = adapt(make_llama())
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(model(tokens).logits, make_llama()(tokens).logits)


@pytest.mark.parametrize("adapter_names", [None, ["second"], ["default", "second"]])
def test_merge_and_unload(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, adapter_names: list[str] | None) -> None:
    model = adapt(make_llama())
    model.add_adapter("second", TcurLoraConfig(r=3, init_weights=False))
    model.base_model.set_adapter(adapter_names or ["default"])
    expected = model(tokens).logits
    plain = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    assert type(plain) is LlamaForCausalLM
    assert {type(m) for n, m in plain.named_modules() if n.endswith("_proj")} == {nn.Linear}
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_conv1d(tokens: Tensor, adapt: Adapt) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        model = adapt(GPT2LMHeadModel(config).eval())
    assert model.base_model.stacks("default")["16x16"].slices == 2 * (3 + 1)  # q, k, v of c_attn, and attn.c_proj
    expected = model(tokens).logits
    plain = model.merge_and_unload()
    assert isinstance(plain.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_safe_merge_refuses_nan_and_changes_nothing_there(
    make_llama: MakeLlama, adapt: Adapt, assert_same: Same
) -> None:
    model = adapt(make_llama(), target_modules=["q_proj"])
    before = weights(model)
    model.base_model.stacks("default")["16x16"].core.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    for now, then in zip(weights(model), before, strict=True):
        assert_same(now, then)
    model.merge_adapter()
    assert bool(weights(model)[0].isnan().any())


def test_half_precision_is_rounded_once(make_llama: MakeLlama, adapt: Adapt, assert_same: Same) -> None:
    model = adapt(make_llama().to(torch.bfloat16), target_modules=["q_proj"])
    layer = next(m for m in model.modules() if isinstance(m, TcurLoraLinear))
    base, change = layer.weight.clone(), layer.slices["default"].delta_weight(torch.float64)
    model.merge_adapter()
    assert_same(layer.weight.data, (base.double() + change).to(torch.bfloat16))
    model.to(torch.float32)
    model.unmerge_adapter()
    assert_same(layer.weight.data, base.float().data)
