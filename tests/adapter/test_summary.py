"""The summary of an adapted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tcurlora_ext as tcur


def test_the_summary_of_a_small_network(network: Any) -> None:
    before = sum(p.numel() for p in network.parameters())
    tcur.inject(network, tcur.TCURConfig(rank=(3, 2)))
    tcur.unfreeze(network, ["head"])
    found = tcur.summary(network)
    assert [(s.name, s.slices, s.shape, s.rank, s.q, s.trained) for s in found.stacks] == [
        ("8x8", 8, (8, 8), (3, 2), 16, 48),
        ("16x8", 2, (16, 8), (3, 2), 4, 12),
        ("8x16", 2, (8, 16), (3, 2), 4, 12),
    ]
    assert found.trained_beside == 8 * 3 + 3
    assert found.trained == 72 + 27
    assert found.frozen == before - 27
    assert found.stacks[0].bytes == 4 * (8 * 3 * 2 + 8 * 24 + 16 * 8)
    for name, stack in tcur.stacks(network).items():
        assert name in str(found)
        assert f"{stack.scale:.4g}" in str(found)


def test_trained_counts_are_those_of_the_parameters(network: Any) -> None:
    tcur.inject(network, tcur.TCURConfig(rank=2, trainable="all"))
    assert tcur.summary(network).trained == sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_a_plain_model_has_none(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="Network is not adapted"):
        tcur.summary(network)
    assert tcur.stacks(network) == {}
    assert torch.is_tensor(network(torch.zeros(1, 2, 6)))
