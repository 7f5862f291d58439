"""What is remarkable about an adapter, in a paragraph."""

from __future__ import annotations

import torch
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.analysis.inspection import inspect_model
from tcurlora_ext.analysis.remarks import remarks


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        model[0].weight[:, 3] *= 10  # one input feature stands out
    return tcur.inject(model, tcur.TCURConfig(rank=1, target_modules=r"\d", **options))  # type: ignore[arg-type]


def test_an_untrained_adapter_changes_nothing() -> None:
    assert "changes nothing" in remarks(inspect_model(adapted()))


def test_the_layer_that_moved_most_is_named_and_what_is_common_is_counted() -> None:
    model = adapted(stack_by="none", transform="identity")
    stacks = tcur.stacks(model)
    for size, stack in zip((0.0, 0.1, 3.0, 0.1), stacks.values(), strict=True):
        stack.set_core_slices(torch.full((1, 1, 1), size))
    text = remarks(inspect_model(model))
    assert "Most moved 2 (" in text
    assert "least moved 0 (0.00%)" in text
    assert "Half of the change's energy is in 1 of 4 slices." in text
    assert "in common" not in text  # of a core for each layer nothing is


def test_a_change_that_all_slices_share_is_common() -> None:
    model = adapted()
    (stack,) = tcur.stacks(model).values()
    core = torch.zeros(4, 1, 1)
    core[0] = 1.0
    with torch.no_grad():
        stack.core.copy_(core)
    assert "in common" in remarks(inspect_model(model))


def test_stacks_of_one_slice_have_nothing_in_common() -> None:
    model = adapted(stack_by="none")
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(torch.ones(1, 1, 1))
    assert "in common" not in remarks(inspect_model(model))


def test_features_that_stand_out_and_those_that_do_not() -> None:
    assert "so that they hardly stand out" in remarks(inspect_model(trained(uniform=True)))
    assert "hardly" not in remarks(inspect_model(trained(uniform=False)))


def trained(uniform: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(layer.weight).Q)
        if not uniform:
            layer.weight[:, 5] *= 9
    model = tcur.inject(nn.Sequential(layer), tcur.TCURConfig(rank=2, target_modules="0"))
    (stack,) = tcur.stacks(model).values()
    stack.set_core_slices(torch.ones(1, 2, 2))
    return model
