"""Banks of whole networks: beams of a language model, its own checkpointing, and the tokens of a vision transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import cores_for, with_cores


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return tcur.inject(transformers.LlamaForCausalLM(config).eval().double(), tcur.TCURConfig(rank=4))


def filled(model: Any, number: int) -> tcur.AdapterBank:
    bank = tcur.AdapterBank(model)
    bank.add_all({str(at): {n: 4 * core for n, core in cores_for(model, at).items()} for at in range(number)})
    return bank


def alone(model: Any, bank: tcur.AdapterBank, name: str | None) -> Any:
    return with_cores(model, None if name is None else bank.cores(name))


def test_generation_with_beams_follows_each_samples_adapter() -> None:
    model = llama()
    bank = filled(model, 2)
    tokens = torch.randint(1, 40, (3, 5))
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with bank.use(["1", -1, "0"]):
        found = model.generate(tokens, **options)
    expected = [alone(model, bank, name).generate(tokens, **options)[at] for at, name in enumerate(["1", None, "0"])]
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, model.generate(tokens, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_models_own_checkpointing_finds_the_ids(reentrant: bool) -> None:
    model = llama().train()
    bank = filled(model, 3)
    parameters = bank.train()
    tokens, gradients = torch.randint(1, 40, (3, 5)), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for ids in (["0", "2", -1], ["1", "0", "2"]):
            with bank.use(ids):
                losses.append(model(tokens, labels=tokens, use_cache=False).loss)
        for loss in losses:
            loss.backward()
        gradients.append([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    for plain, again in zip(*gradients, strict=True):
        assert_close(again, plain, rtol=1e-10, atol=1e-12)


def test_each_volume_has_its_adapter_in_monais_vit() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    vit = nets.ViT(1, (8, 8, 8), (4, 4, 4), hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2).eval().double()
    model = tcur.inject(vit, tcur.TCURConfig(rank=4))
    bank = filled(model, 2)
    x = torch.randn(3, 1, 8, 8, 8, dtype=torch.float64)
    y = model(x, adapter_ids=["1", -1, "0"])[0]
    for at, name in enumerate(["1", None, "0"]):
        assert_close(y[at], alone(model, bank, name)(x)[0][at], rtol=1e-12, atol=1e-12)
