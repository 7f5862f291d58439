"""The default scale: at one learning rate, the first step of a stack is as long as LoRA's, in networks of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.structure import adapted_layers

LEARNING_RATE = 1e-3
LORA_RANK = 8


def deep_narrow() -> tuple[nn.Module, Tensor]:
    """Twelve blocks of width 64: one stack of 12 slices 256 x 64, one of 12 slices 64 x 256."""
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(12)]
    return nn.Sequential(*blocks), torch.randn(33, 64)


def single_wide() -> tuple[nn.Module, Tensor]:
    """Stacks of one slice, 2048 x 48 and 2048 x 2048."""
    return nn.Sequential(nn.Linear(48, 2048), nn.GELU(), nn.Linear(2048, 2048)), torch.randn(33, 48)


def uneven_spectrum() -> tuple[nn.Module, Tensor]:
    """Weights with singular values 1/i, as trained networks have them: chosen columns are then far from orthogonal."""
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(5)])
    decay = 1.0 / torch.arange(1, 97)
    for layer in model:
        assert isinstance(layer, nn.Linear)
        left, right = (torch.linalg.qr(torch.randn(96, 96)).Q for _ in range(2))
        layer.weight.data = left @ torch.diag(decay) @ right
    return model, torch.randn(33, 96)


def parallel_features() -> tuple[nn.Module, Tensor]:
    """Weights whose columns, and rows, share a direction: the worst case for large ranks."""
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(4)])
    for layer in model:
        assert isinstance(layer, nn.Linear)
        layer.weight.data.mul_(0.3).add_(0.3 * torch.outer(torch.randn(96), torch.rand(96)))
    return model, torch.randn(33, 96)


def first_step(model: nn.Module, x: Tensor) -> None:
    target = torch.randn(x.shape[0], 1, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    (model(x) - target).square().mean().backward()
    optimizer.step()


def root_mean_square(changes: list[Tensor]) -> float:
    return float(torch.stack([change.detach().norm().square() for change in changes]).mean().sqrt())


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("make", [deep_narrow, single_wide, uneven_spectrum])
def test_first_adam_step_is_within_a_factor_three_of_loras(make, domain: str, rank: int) -> None:
    torch.manual_seed(0)
    plain, x = make()
    names = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    config = tcur.TCURConfig(rank=rank, target_modules=names, core_domain=domain)
    model = tcur.inject(copy.deepcopy(plain), config)
    lora = get_peft_model(plain, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names))
    first_step(model, x)
    first_step(lora, x)

    for stack in tcur.stacks(model).values():
        layers = [(name, layer) for name, layer in adapted_layers(model) if layer.stack is stack]
        ours = root_mean_square([layer.delta_weight() for _, layer in layers])
        theirs = root_mean_square(
            [lora.base_model.model.get_submodule(name).get_delta_weight("default") for name, _ in layers]
        )
        assert theirs / 3 < ours < 3 * theirs


def steps_by_rank(make: Callable[[], tuple[nn.Module, Tensor]], **options: Any) -> list[list[float]]:
    """RMS change of each stack in the first Adam step, for r = 1, 2, 4, ..., 64: one list per rank."""
    found = []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        torch.manual_seed(0)
        model, x = make()
        tcur.inject(model, tcur.TCURConfig(rank=rank, target_modules=r"\d+(\.\d+)?", **options))
        first_step(model, x)
        found.append([root_mean_square(list(stack.delta_weights())) for stack in tcur.stacks(model).values()])
    return found


@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("make", [deep_narrow, uneven_spectrum, parallel_features])
def test_the_stabilised_first_step_neither_shrinks_nor_grows_with_the_rank(make, domain: str) -> None:
    for steps in zip(*steps_by_rank(make, rank_stabilised=True, core_domain=domain), strict=True):
        assert max(steps) < 1.35 * min(steps)


def test_without_it_large_ranks_step_further_on_correlated_weights() -> None:
    for make, growth in ((uneven_spectrum, 3), (parallel_features, 20)):
        (steps,) = zip(*steps_by_rank(make), strict=True)
        assert steps[-1] > growth * steps[0]


def test_raw_factors_are_not_portable() -> None:
    """Without the rule, in the paper's raw form, the lengths of the same step differ by more than a factor of ten."""
    torch.manual_seed(0)
    steps = []
    for make in (deep_narrow, single_wide):
        plain, x = make()
        model = tcur.inject(plain, tcur.TCURConfig(rank=4, target_modules=["0", "2"], scale=1.0))
        first_step(model, x)
        for stack in tcur.stacks(model).values():
            assert stack.scale == 1.0
            relative = stack.delta_weights().flatten(1).norm(dim=1).mean() / stack.shape[0] ** 0.5
            steps.append(relative.item())
    assert max(steps) > 10 * min(steps)
