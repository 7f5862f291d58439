"""What a stack is made with: one object, the same from TCURConfig, from PEFT's configuration and from keywords."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.options import GIVEN, StackOptions, pair_of
from tcurlora_ext.adapter.stack.factors import take_factors
from tcurlora_ext.maths.selection import Selection, select

# A value for every option other than its default, each with what it needs beside it.
OTHER: dict[str, dict[str, Any]] = {
    "rank": {"rank": (3, 2)},
    "selection": {"selection": "uniform"},
    "scale": {"scale": 0.5},
    "trainable": {"trainable": "all"},
    "transform": {"transform": "dct"},
    "backend": {"backend": "eager"},
    "seed": {"seed": 7, "selection": "uniform"},
    "alpha": {"alpha": 2.0},
    "core_domain": {"core_domain": "slice"},
    "dropout": {"dropout": 0.25},
    "rank_stabilised": {"rank_stabilised": True},
    "frequencies": {"frequencies": 2},
    "orthonormal": {"orthonormal": True},
}
# "factors" needs a subspace of the model: tests/adapter/learned.
OPTIONS = [option.name for option in dataclasses.fields(StackOptions) if option.name != "factors"]


def paired(options: StackOptions) -> StackOptions:
    """With the rank as (c, r), which r alone stands for too."""
    return dataclasses.replace(options, rank=pair_of(options.rank))


def model() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(8, 24)}) for _ in range(2))})


def test_every_option_has_another_value_here() -> None:
    assert list(OTHER) == OPTIONS
    defaults = StackOptions()
    for name, options in OTHER.items():
        assert options[name] != getattr(defaults, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_the_stacks_from_the_configuration(name: str) -> None:
    config = tcur.TCURConfig(**OTHER[name], target_modules=["qkv"])
    (stack,) = tcur.stacks(tcur.inject(model(), config)).values()
    assert paired(stack.options) == paired(StackOptions(**OTHER[name]))
    assert tcur.TCURConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "trainable"])
def test_an_option_reaches_the_stacks_from_pefts_configuration(name: str) -> None:
    peft = pytest.importorskip("peft")
    from tcurlora_ext.integrations.peft import TcurLoraConfig

    options = {"r" if key == "rank" else key: value for key, value in OTHER[name].items()}
    adapted = peft.get_peft_model(model(), TcurLoraConfig(target_modules=["qkv"], **options))
    (stack,) = adapted.base_model.stacks("default").values()
    assert paired(stack.options) == paired(StackOptions(**OTHER[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_a_stack_from_keywords(name: str) -> None:
    given = {"scale": None} | OTHER[name]
    stack = tcur.TCURStack.from_weights(torch.randn(4, 9, 8), **given)
    assert stack.options == StackOptions(**given)
    layer = tcur.TCURLinear(8, 9, **OTHER[name])
    assert layer.stack.options == StackOptions(**OTHER[name])


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"rank", "selection", "scale"}))
def test_an_option_can_be_read_from_the_stack(name: str) -> None:
    stack = tcur.TCURStack.from_weights(torch.randn(4, 9, 8), **{"scale": None} | OTHER[name])
    assert getattr(stack, name) == OTHER[name][name]
    with pytest.raises(AttributeError):
        setattr(stack, name, None)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="ranks"):
        tcur.TCURStack.from_weights(torch.randn(4, 6, 5), ranks=3)


def test_the_first_arguments_of_the_configuration_keep_their_order() -> None:
    order = [p.name for p in inspect.signature(tcur.TCURConfig).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert order == ["rank", "target_modules", "exclude_modules", "stack_by", "split_fused"]


@pytest.mark.parametrize("scale", [None, 0.5])
def test_taking_factors_changes_nothing_and_gives_the_same_again(scale: float | None) -> None:
    weights, options = torch.randn(3, 6, 5), StackOptions(2, scale=scale)
    chosen = select(weights, 2, 2)
    stack = tcur.TCURStack.with_options(weights, options)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    other = take_factors(torch.randn(3, 6, 5), chosen, stack.options)
    assert scale is not None or other.scale != stack.scale
    again = take_factors(weights, chosen, options)
    assert torch.equal(again.col, stack.col)
    assert torch.equal(again.row, stack.row)
    assert again.scale == stack.scale
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_a_selection_of_the_callers_stays_when_the_base_changes() -> None:
    chosen = Selection(torch.tensor([4, 1]), torch.tensor([0, 3, 2]), torch.zeros(2), torch.zeros(3))
    stack = tcur.TCURStack.from_weights(torch.randn(3, 6, 5), (3, 2), chosen)
    assert stack.options.selection == GIVEN
    other = torch.randn(3, 6, 5)
    stack.follow_base(other)
    assert stack.rows.tolist() == [4, 1]
    assert stack.columns.tolist() == [0, 3, 2]
    assert_close(stack.C, other[:, :, [0, 3, 2]])
    assert_close(stack.R, other[:, [4, 1]])
    by_norm = tcur.TCURStack.from_weights(torch.randn(3, 6, 5), (3, 2))
    by_norm.follow_base(other)
    expected = select(other, 3, 2)
    assert torch.equal(by_norm.rows, expected.rows)
    assert by_norm.row_scores == expected.row_scores.tolist()


def test_a_selection_of_the_callers_stays_when_a_plain_state_is_loaded() -> None:
    chosen = Selection(torch.tensor([4]), torch.tensor([2]), torch.zeros(1), torch.zeros(1))
    layer = tcur.TCURLinear(5, 6, rank=1, selection=chosen)
    plain = nn.Linear(5, 6)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert (layer.stack.rows.tolist(), layer.stack.columns.tolist()) == ([4], [2])
    assert_close(layer.stack.C[0] * plain.weight[:, 2:3].norm(), plain.weight[:, 2:3].detach())
