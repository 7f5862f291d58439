"""Merging whole models: the same output, and the base restored bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_equals_unmerged_and_back_bit_for_bit(adapted: Any, x: Tensor, dtype: torch.dtype) -> None:
    adapted.to(dtype)
    x = x.to(dtype)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    y = adapted(x)
    assert tcur.merge(adapted) is adapted
    changed = [n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == 8
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # sums in another order, through two blocks
    assert_close(adapted(x), y, rtol=tolerance, atol=tolerance)
    assert tcur.unmerge(adapted) is adapted
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]), name
    assert torch.equal(adapted(x), y)


def test_bfloat16_comes_back_bit_for_bit_and_tells_of_lost_rounding(adapted: Any, train: Any) -> None:
    train(adapted, 1e-4)
    adapted.bfloat16()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 changed a merged dW by up to \d+%"):
        tcur.merge(adapted)
    tcur.unmerge(adapted)
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_change_that_is_not_finite_merges_nothing(adapted: Any, state_of: Any, assert_unchanged: Any) -> None:
    with torch.no_grad():
        tcur.stacks(adapted)["8x16"].core[0, 0, 0] = float("nan")
    before = state_of(adapted)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.linear2: .*NaN or infinite.*nothing was merged"):
        tcur.merge(adapted)
    assert_unchanged(adapted, before)


def test_merging_twice_is_merging_once(adapted: Any, x: Tensor) -> None:
    y = tcur.merge(adapted)(x)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    assert torch.equal(tcur.merge(adapted)(x), y)
    tcur.unmerge(adapted)
    tcur.merge(adapted)
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_copy_and_a_moved_model_unmerge_too(adapted: Any, x: Tensor) -> None:
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    other = copy.deepcopy(tcur.merge(adapted))
    other = other.double().float()
    tcur.unmerge(other)
    for name, p in other.named_parameters():
        assert torch.equal(p, before[name]), name
    assert adapted.blocks[0].mlp.linear1.merged


def test_the_state_of_a_merged_model_is_that_of_the_unmerged_one(adapted: Any) -> None:
    before = {name: t.clone() for name, t in adapted.state_dict().items()}
    after = tcur.merge(adapted).state_dict()
    assert after.keys() == before.keys()
    for name, t in after.items():
        assert torch.equal(t, before[name]), name


def test_loading_a_state_into_a_merged_model_is_refused(adapted: Any) -> None:
    """As with any error in load_state_dict, modules before the layer are loaded; the layer and its base are not."""
    other = {name: t + 1 if t.is_floating_point() else t for name, t in adapted.state_dict().items()}
    base = adapted.blocks[0].attn.qkv.weight.detach().clone()
    tcur.merge(adapted)
    merged = adapted.blocks[0].attn.qkv.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight: this layer is merged; call unmerge"):
        adapted.load_state_dict(other)
    assert torch.equal(adapted.blocks[0].attn.qkv.weight, merged)
    tcur.unmerge(adapted)
    assert torch.equal(adapted.blocks[0].attn.qkv.weight, base)


class Tied(nn.Module):
    """Tied weights as in a language model: the output layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.embedding(x))


class Twice(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    ("model", "targets", "x"),
    [(Tied(), ["lm_head"], torch.arange(5)), (Twice(), ["a", "b"], torch.ones(2, 8))],
    ids=["embedding", "layers"],
)
def test_tied_weights_merge_each_on_its_own(model: nn.Module, targets: list[str], x: Tensor, train: Any) -> None:
    """dW belongs to one layer, not to all modules that share its weight."""
    train(tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=targets)))
    before, y = {name: t.clone() for name, t in model.state_dict().items()}, model(x)
    tcur.merge(model)
    assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    tcur.unmerge(model)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert torch.equal(model(x), y)
    assert len({p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False) if "weight" in n}) == 1
