"""factors_of_change: the directions between a base and a changed copy of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tcurlora_ext as tcur

LEARNED = tcur.TCURConfig.preset("learned", rank=2)


def _changed(network: nn.Module, rank: int = 2) -> nn.Module:
    """A copy whose adapted weights differ by a change of low rank."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for block in other.blocks:
            for layer in (block.attn.out_proj, block.mlp.linear1, block.mlp.linear2):
                out_features, in_features = layer.weight.shape
                layer.weight += 0.1 * torch.randn(out_features, rank) @ torch.randn(rank, in_features)
            block.attn.qkv.weight.view(3, 8, 8).add_(0.1 * torch.randn(3, 8, rank) @ torch.randn(3, rank, 8))
    return other


def test_a_change_of_the_adapters_rank_can_be_made_again(network: nn.Module) -> None:
    other = _changed(network)
    found = tcur.factors_of_change(network, LEARNED, other, bits=32)
    adapted = tcur.inject(copy.deepcopy(network), subspace=found)
    for stack in tcur.stacks(adapted).values():
        named = [name.partition("[") for name in stack.names]
        change = torch.stack([
            (other.get_submodule(name).weight - network.get_submodule(name).weight).view(-1, *stack.shape)[
                int(part.rstrip("]") or 0)
            ]
            for name, _, part in named
        ])  # fmt: skip
        stack.set_core_slices(stack.C.mT @ change @ stack.R.mT / stack.scale)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(adapted(x), other(x), rtol=1e-4, atol=1e-5)
    assert all(stack.energy == pytest.approx(1, abs=1e-5) for stack in found.stacks.values())


@pytest.mark.parametrize("kind", ["module", "state", "safetensors", "checkpoint"])
def test_the_changed_model_in_any_form(network: nn.Module, tmp_path: Path, kind: str) -> None:
    other = _changed(network)
    change: object = other
    if kind == "state":
        change = other.state_dict()
    elif kind == "safetensors":
        change = tmp_path / "changed.safetensors"
        safetensors.torch.save_file(other.state_dict(), change)
    elif kind == "checkpoint":
        change = tmp_path / "changed.pt"
        torch.save({"state_dict": {f"module.{n}": t for n, t in other.state_dict().items()}}, change)
    before = copy.deepcopy(network.state_dict())
    found = tcur.factors_of_change(network, LEARNED, change)
    expected = tcur.factors_of_change(network, LEARNED, other)
    assert found.stacks.keys() == expected.stacks.keys()
    assert all(torch.equal(found.tensors()[name], t) for name, t in expected.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))


def test_of_several_changes_the_subspace_has_the_directions_of_each(network: nn.Module) -> None:
    changes = [_changed(network, rank=1) for _ in range(2)]
    with torch.no_grad():  # one of them is ten times as large
        for (name, p), q in zip(changes[1].named_parameters(), network.parameters(), strict=True):
            if "blocks" in name:
                p.copy_(q + 10 * (p - q))
    found = tcur.factors_of_change(network, LEARNED, list(changes), bits=32)
    assert all(stack.energy == pytest.approx(1, abs=1e-5) for stack in found.stacks.values())
    adapted = tcur.inject(copy.deepcopy(network), subspace=found)
    stack = next(s for s in tcur.stacks(adapted).values() if s.slices == 1)
    layer = stack.names[0]
    for change in changes:
        part = (change.get_submodule(layer).weight - network.get_submodule(layer).weight).detach()
        inside = stack.C[0] @ (stack.C[0].T @ part @ stack.R[0].T) @ stack.R[0]
        torch.testing.assert_close(inside, part, rtol=1e-3, atol=1e-4)


def test_a_lora_adapter_in_place_of_a_warm_up(network: nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["out_proj", "linear1", "linear2"]
    model = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(r=3, target_modules=names))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path / "lora")
    config = tcur.TCURConfig.preset("learned", rank=3, target_modules=names)
    before = copy.deepcopy(network.state_dict())
    found = tcur.factors_of_change(network, config, tmp_path / "lora", bits=32)
    assert all(stack.energy == pytest.approx(1, abs=1e-4) for stack in found.stacks.values())
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))
    with pytest.raises(ValueError, match="rank 3 at slice 0, expected at least 4"):
        tcur.factors_of_change(
            network, tcur.TCURConfig.preset("learned", rank=4, target_modules=names), tmp_path / "lora"
        )


def test_wrong_changes_are_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the change is zero"):
        tcur.factors_of_change(network, LEARNED, network)
    state = _changed(network).state_dict()
    name = "blocks.0.mlp.linear1.weight"
    with pytest.raises(ValueError, match=f"the changed model has no {name}"):
        tcur.factors_of_change(network, LEARNED, {key: t for key, t in state.items() if key != name})
    with pytest.raises(ValueError, match=r"linear1.weight of the changed model has shape \(4, 4\), expected \(16, 8\)"):
        tcur.factors_of_change(network, LEARNED, state | {name: torch.ones(4, 4)})
    with pytest.raises(ValueError, match="NaN or infinite"):
        tcur.factors_of_change(network, LEARNED, state | {name: torch.full((16, 8), torch.nan)})
    with pytest.raises(ValueError, match="factors is 'weights'"):
        tcur.factors_of_change(network, tcur.TCURConfig(rank=2), state)
    with pytest.raises(ValueError, match="empty list"):
        tcur.factors_of_change(network, LEARNED, [])
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        tcur.factors_of_change(network, LEARNED, tmp_path / "nothing.pt")
