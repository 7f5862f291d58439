"""A small Llama, quantised by transformers on loading: training, generation, saving, loading and merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

Load = Callable[[], LlamaForCausalLM]


def in_4_bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def in_8_bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def by_torchao() -> TorchAoConfig:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


QUANTISED = {"bitsandbytes 4 bit": in_4_bit, "bitsandbytes 8 bit": in_8_bit, "torchao int8": by_torchao}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with weights larger than the configuration's 0.02, so that its blocks affect the output."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTISED)
def load(request: pytest.FixtureRequest, folder: Path) -> Load:
    return lambda: LlamaForCausalLM.from_pretrained(folder, quantization_config=QUANTISED[request.param]()).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 64, (4, 8))


def train(model: PeftModel, tokens: Tensor, folder: Path, **options: Any) -> PeftModel:
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=len(tokens), learning_rate=0.02, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens]).train()
    return model.eval()


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    return float(model(input_ids=tokens, labels=tokens).loss)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def generate(model: Any, tokens: Tensor) -> Tensor:
    fixed = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **fixed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains_the_cores_and_leaves_the_codes(
    load: Load, tokens: Tensor, tmp_path: Path, checkpointing: bool
) -> None:
    model = get_peft_model(load(), TcurLoraConfig(r=4, task_type="CAUSAL_LM"))
    codes = [m.get_base_weight().clone() for m in model.modules() if isinstance(m, TcurLoraLinear)]
    assert len(codes) == 14
    before = loss(model.eval(), tokens)
    train(model, tokens, tmp_path, gradient_checkpointing=checkpointing)
    assert loss(model, tokens) < 0.95 * before
    after = [m.get_base_weight() for m in model.modules() if isinstance(m, TcurLoraLinear)]
    assert all(torch.equal(now, then) for now, then in zip(after, codes, strict=True))


def test_saved_and_loaded_it_computes_and_writes_the_same(load: Load, tokens: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(load(), TcurLoraConfig(r=4, task_type="CAUSAL_LM", init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    written = generate(model, tokens)
    assert torch.equal(generate(loaded, tokens), written)
    assert not torch.equal(generate(load(), tokens), written)


@torch.no_grad()
def test_the_adapter_merges_into_the_base_that_was_not_quantised(
    load: Load, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    """The merged model differs from the adapted quantised model as much as the two bases differ."""
    model = get_peft_model(load(), TcurLoraConfig(r=4, task_type="CAUSAL_LM", init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    rounding = distance(load()(tokens).logits, plain(tokens).logits)
    merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    assert distance(merged(tokens).logits, model(tokens).logits) < 2 * rounding


@torch.no_grad()
def test_merged_it_is_as_close_as_quantising_again_allows(load: Load, tokens: Tensor) -> None:
    """docs/peft.md states the tolerances."""
    model = get_peft_model(load(), TcurLoraConfig(r=4, task_type="CAUSAL_LM", init_weights=False)).eval()
    for stack in model.base_model.stacks("default").values():
        stack.core.mul_(3)
    layer = next(m for m in model.modules() if isinstance(m, TcurLoraLinear))
    base, stored = layer.get_base_layer(), type(layer.get_base_layer().weight)
    wanted = layer.get_base_weight() + layer.get_delta_weight("default")
    without, expected = load()(tokens).logits, model(tokens).logits

    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert merged.model.layers[0].self_attn.q_proj is base
    assert type(base.weight) is stored
    tolerance = 0.1 if "4bit" in type(base).__name__ else 0.01
    assert distance(layer.get_base_weight(), wanted) < tolerance
    assert distance(merged(tokens).logits, expected) < 0.5 * distance(without, expected)
