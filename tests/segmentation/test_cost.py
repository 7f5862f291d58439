"""What a training step costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tcurlora_ext.saved import saved_for_backward
from tcurlora_ext.segmentation.methods import Task
from tcurlora_ext.segmentation.training import Progress, step_memory, step_times


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 1))


def test_the_memory_of_a_step_is_counted_and_changes_nothing(task: Task) -> None:
    model = small()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    full = step_memory(model, task.volumes, task.plan)
    model[0].requires_grad_(False)
    head = step_memory(model, task.volumes, task.plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (full.gradients, full.optimizer) == (4 * (4 * 28 + 15), 8 * (4 * 28 + 15))
    assert (head.gradients, head.optimizer) == (4 * 15, 8 * 15)
    # of two windows of 16 voxels a side in float32, training the first layer keeps its input, one channel; the output
    # of tanh is kept either way, as the input of the last layer
    assert full.kept - head.kept == 4 * 2 * 16**3
    assert full.peak is None
    assert full.counted_mib == pytest.approx((full.kept + full.gradients + full.optimizer) / 2**20)


def test_what_is_saved_counts_once_and_without_parameters() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(7, 3)
    with saved_for_backward(layer) as saved:
        y = layer(x) + layer(x)
        y.exp().sum()
    assert sorted(saved.values()) == [4 * 7 * 3, 4 * 7 * 5]  # x once, and the output of exp


def test_timed_steps_train_and_leave_the_random_state(task: Task) -> None:
    model, state = small(), torch.get_rng_state()
    weight = model[2].weight.detach().clone()
    times = step_times(model, task.volumes, task.plan, count=2, untimed=1)
    assert len(times) == 2
    assert min(times) > 0
    assert not torch.equal(model[2].weight, weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_time_of_a_step_is_the_median_without_the_first_three() -> None:
    assert Progress(times=[9.0, 9.0, 9.0, 0.001, 0.003, 0.002]).step_ms == pytest.approx(2.0)
    assert Progress(times=[0.004]).step_ms == pytest.approx(4.0)
    assert Progress().step_ms != Progress().step_ms
