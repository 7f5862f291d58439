"""Tiny models with random weights, and adapters for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tcurlora_ext.integrations.peft import TcurLoraConfig


@pytest.fixture
def make_llama() -> Callable[[], LlamaForCausalLM]:
    """Two blocks; stacks 16x16 (q, o; S=4), 8x16 (k, v; S=4), 32x16 (gate, up; S=4), 16x32 (down; S=2)."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)

    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(copy.deepcopy(config)).eval()

    return make


@pytest.fixture
def make_unetr() -> Callable[[], UNETR]:
    """Twelve blocks; stacks 16x16 (q, k, v, out; S=48), 32x16 (S=12), 16x32 (S=12)."""
    sizes = {"img_size": (16, 16, 16), "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "feature_size": 2}

    def make() -> UNETR:
        torch.manual_seed(0)
        return UNETR(in_channels=1, out_channels=2, **sizes).eval()

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 64, (3, 5))


@pytest.fixture
def adapt() -> Callable[..., PeftModel]:
    """Add an adapter to a model, by default one that changes the output."""

    def adapt(model: nn.Module, **options: Any) -> PeftModel:
        return get_peft_model(model, TcurLoraConfig(**({"r": 2, "init_weights": False} | options))).eval()

    return adapt
