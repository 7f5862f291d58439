"""learn_factors: what it leaves as it was, what it learns, and what it refuses."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

Step = Callable[[nn.Module], Tensor]
LEARNED = tcur.TCURConfig.preset("learned", rank=2)


def _leave_traces(model: nn.Module) -> None:
    """Gradients, modes, flags and random states that have to be there afterwards."""
    model.train()
    model.blocks[0].eval()
    model.embed.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)


def _everything(model: nn.Module) -> list[Any]:
    return [
        {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [p.requires_grad for p in model.parameters()], [module.training for module in model.modules()],
        torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),
    ]  # fmt: skip


def _same(before: list[Any], after: list[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert (value is None) == (other[name] is None), name
                assert value is None or torch.equal(value, other[name]), name
        elif isinstance(one, Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


def _noisy(step: Step) -> Step:
    """A step that draws from all random generators."""

    def drawing(model: nn.Module) -> Tensor:
        return step(model) * (1 + 0.01 * (torch.rand(()) + random.random() + np.random.rand()))

    return drawing


def test_the_model_and_the_random_states_are_as_before(network: nn.Module, step: Step) -> None:
    _leave_traces(network)
    before = _everything(network)
    tcur.learn_factors(network, LEARNED, _noisy(step), steps=3, unfreeze=["head", "norm"])
    _same(before, _everything(network))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_so_they_are_after_an_error_or_an_interrupt(network: nn.Module, step: Step, error: type[BaseException]) -> None:
    _leave_traces(network)
    before = _everything(network)
    calls = 0

    def failing(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return _noisy(step)(model)

    with pytest.raises(error):
        tcur.learn_factors(network, LEARNED, failing, steps=5, unfreeze="head")
    assert calls == 3
    _same(before, _everything(network))


def test_the_warm_up_trains_the_weights_and_what_is_unfrozen(network: nn.Module, step: Step) -> None:
    seen: list[dict[str, Tensor]] = []

    def watched(model: nn.Module) -> Tensor:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return step(model)

    tcur.learn_factors(network, LEARNED, watched, steps=2, unfreeze="head")
    moved = {name for name in seen[0] if not torch.equal(seen[0][name], seen[1][name])}
    adapted = {f"blocks.{b}.{layer}.weight" for b in (0, 1) for layer in
               ("attn.qkv", "attn.out_proj", "mlp.linear1", "mlp.linear2")}  # fmt: skip
    assert moved == adapted | {"head.weight", "head.bias"}


def test_the_learning_rate_rises_over_the_ramp(network: nn.Module, step: Step) -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    tcur.learn_factors(network, LEARNED, step, 5, ramp=4, optimizer=lambda p: Watched(p, lr=0.1))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_an_adapter_over_it_learns_more_in_a_step_than_over_random_directions(network: nn.Module, step: Step) -> None:
    """With plain gradient steps of one length on the cores, the loss falls further where the change lies."""

    def loss_after(subspace: tcur.Subspace) -> float:
        model = tcur.inject(copy.deepcopy(network), subspace=subspace)
        step(model).backward()
        cores = [stack.core for stack in tcur.stacks(model).values()]
        length = float(torch.stack([core.grad.norm() for core in cores]).norm())
        with torch.no_grad():
            for core in cores:
                core -= 0.05 / length * core.grad
        return float(step(model).detach())

    learned = tcur.learn_factors(network, LEARNED, step, steps=20)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * torch.randn_like(p)
    assert loss_after(learned) < loss_after(tcur.factors_of_change(network, LEARNED, other))


def test_in_parts_every_layer_is_learned_from_the_base(network: nn.Module, step: Step) -> None:
    weights = []

    def watched(model: nn.Module) -> Tensor:
        weights.append({n for n, p in model.named_parameters() if p.requires_grad})
        return step(model)

    found = tcur.learn_factors(network, LEARNED, watched, 2, parts=4)
    assert len(weights) == 8
    assert [len(names) for names in weights] == [2] * 8
    assert len(set.union(*weights)) == 8
    assert found.parameters == tcur.learn_factors(network, LEARNED, step, 2).parameters


def test_several_tasks_take_turns(network: nn.Module, step: Step) -> None:
    turns = []

    def task(name: str) -> Step:
        def call(model: nn.Module) -> Tensor:
            turns.append(name)
            return step(model)

        return call

    tcur.learn_factors(network, LEARNED, [task("a"), task("b"), task("c")], steps=5)
    assert turns == ["a", "b", "c", "a", "b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_dtype_trains_in_float32(network: nn.Module, dtype: torch.dtype) -> None:
    """At this rate a step on a bfloat16 weight itself would be rounded away, and the change zero."""
    model = network.to(dtype)
    x = torch.randn(2, 5, 6).to(dtype)
    before = copy.deepcopy(model.state_dict())
    found = tcur.learn_factors(model, LEARNED, lambda m: m(x).float().square().mean(), steps=3, lr=1e-5)
    assert all(stack.change > 0 for stack in found.stacks.values())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert torch.equal(tcur.inject(model, subspace=found)(x).isfinite(), torch.ones(2, 5, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": tcur.TCURConfig(rank=2)}, "factors is 'weights', expected 'learned'"),
        ({"step": lambda model: None}, "step returned NoneType, expected the loss"),
        ({"step": lambda model: model(torch.randn(1, 2, 6))}, r"tensor of shape \(1, 2, 3\), expected the loss"),
        ({"step": lambda model: torch.ones(())}, "does not depend on the model's weights"),
        ({"step": lambda model: model(torch.randn(1, 2, 6)).sum() * torch.nan}, "loss of step 0 is nan"),
        ({"step": lambda model: model.head(torch.randn(1, 8)).sum(), "unfreeze": "head"}, "got no gradient from step"),
        ({"step": lambda model: 0 * model(torch.randn(1, 2, 6)).sum()}, "the change is zero"),
        ({"step": []}, "step is an empty list"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"bits": 5}, "bits is 5, expected one of 1, 2, 4"),
        ({"unfreeze": "decoder"}, "'decoder' matches no parameter"),
        ({"config": tcur.TCURConfig.preset("learned", rank=9)}, "does not fit"),
    ],
)
def test_wrong_input_is_one_error_and_changes_nothing(
    network: nn.Module, step: Step, change: dict[str, Any], message: str
) -> None:
    _leave_traces(network)
    before = _everything(network)
    arguments = {"config": LEARNED, "step": step, "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        tcur.learn_factors(network, **arguments)
    _same(before, _everything(network))


def test_an_adapted_model_is_refused(adapted: nn.Module, step: Step) -> None:
    with pytest.raises(ValueError, match="is adapted already"):
        tcur.learn_factors(adapted, LEARNED, step)
