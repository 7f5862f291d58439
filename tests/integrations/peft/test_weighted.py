"""Weighted sums of adapters: an ordinary adapter whose dW is the sum of theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]
Make = Callable[..., PeftModel]

WEIGHTS = {"default": 1.5, "second": -0.5, "third": 2.0}


@pytest.fixture
def make(make_llama: MakeLlama, adapt: Adapt) -> Make:
    """A model with the adapters "default", "second", ..., one for each of the given options."""

    def make(*options: dict[str, Any]) -> PeftModel:
        common = {"r": 2, "init_weights": False, "target_modules": ["q_proj", "o_proj", "down_proj"]}
        model = adapt(make_llama(), **(common | options[0]))
        for name, others in zip(("second", "third"), options[1:], strict=False):
            model.add_adapter(name, TcurLoraConfig(**(common | others)))
        return model.eval()

    return make


def assert_sum(model: PeftModel, adapter: str, parts: list[str]) -> None:
    """Every layer's dW is the weighted sum of the parts' dW, up to rounding of a float32 core."""
    for layer in (module for module in model.modules() if isinstance(module, TcurLoraLinear)):
        own = [WEIGHTS[name] * layer.slices[name].delta_weight(torch.float64) for name in parts if name in layer.slices]
        assert (adapter in layer.slices) == bool(own)
        if own:
            found, expected = layer.slices[adapter].delta_weight(torch.float64), torch.stack(own).sum(0)
            assert bool(expected.any())
            assert float((found - expected).norm()) < 1e-6 * max(float(part.norm()) for part in own)


DIFFERENT = [
    ({}, {"selection": "uniform"}),
    ({}, {"r": (3, 1), "alpha": 4.0}, {"selection": "leverage"}),
    ({"transform": "dct"}, {"transform": "dct", "r": 3}),
    ({"transform": "identity"}, {"transform": "identity", "r": 3}),
    ({"frequencies": 1}, {"frequencies": 1, "r": 3}),
    ({"scale": 1.0}, {"scale": 0.5, "selection": "uniform"}),
    ({"core_domain": "slice"}, {"core_domain": "slice", "r": 3}),
    ({"orthonormal": True}, {"orthonormal": True, "r": 3}),
    ({"orthonormal": True, "selection": "uniform"}, {"orthonormal": True, "r": 3}),
    ({"target_modules": ["q_proj"]}, {"target_modules": ["down_proj"]}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"], "r": 3}),
]


@pytest.mark.parametrize("options", DIFFERENT)
def test_cat_is_the_sum_of_any_adapters(
    make: Make, make_llama: MakeLlama, tokens: Tensor, options: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    model = make(*options)
    parts = list(WEIGHTS)[: len(options)]
    model.add_weighted_adapter(parts, [WEIGHTS[name] for name in parts], "sum", combination_type="cat")
    assert_sum(model, "sum", parts)

    model.set_adapter("sum")
    expected = model(tokens).logits
    for save_projection in (True, False):
        model.peft_config["sum"].save_projection = save_projection
        model.save_pretrained(tmp_path / str(save_projection), selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / str(save_projection) / "sum").eval()
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-6)


def test_linear_keeps_the_rank_and_c_and_r_of_adapters_that_share_them(make: Make) -> None:
    model = make({}, {"alpha": 4.0})
    model.add_weighted_adapter(["default", "second"], [1.5, -0.5], "sum")
    assert_sum(model, "sum", ["default", "second"])
    for name, stack in model.base_model.stacks("sum").items():
        of_default = model.base_model.stacks("default")[name]
        assert stack.rank == of_default.rank
        assert stack.col is of_default.col
        assert stack.rows is not of_default.rows


def test_one_adapter_is_multiplied_whatever_the_combination(make: Make) -> None:
    model = make({})
    model.add_weighted_adapter(["default"], [1.5], "sum", "cat")
    assert_sum(model, "sum", ["default"])
    assert {stack.rank for stack in model.base_model.stacks("sum").values()} == {(2, 2)}


def test_the_sum_is_inactive_trains_when_set_and_is_apart_from_its_parts(make: Make, tokens: Tensor) -> None:
    model = make({}, {"selection": "uniform"})
    before = model(tokens).logits
    model.add_weighted_adapter(["default", "second"], [1.5, -0.5], "sum", "cat")
    assert model.active_adapters == ["default"]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ".sum." in n]
    model.set_adapter("sum")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in trained} == {"sum"}
    model(tokens).logits.square().sum().backward()
    with torch.no_grad():
        for p in trained.values():
            assert bool(p.grad.any())
            p.sub_(p.grad)
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, before)
    model.delete_adapter("sum")
    assert list(model.peft_config) == ["default", "second"]


BOTH = (["default", "second"], [1.0, 1.0], "sum")


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, (*BOTH, "svd"), "combination_type is 'svd', expected one of 'linear', 'cat'"),
        ({}, (["default", "second"], [1.0], "sum"), "found 2 adapters and 1 weights"),
        ({}, (["default", "secnd"], [1.0, 1.0], "sum"), "adapter secnd does not exist, expected some of default, sec"),
        ({}, (["default"], [1.0], "second"), "adapter second exists, expected a new name"),
        ({"r": 3}, BOTH, r"default and second have different columns in the stack of .*q_proj"),
        ({"r": 15}, (*BOTH, "cat"), r"\(17, 17\) does not fit 16 x 16 weights"),
        ({"transform": "dct"}, (*BOTH, "cat"), "transform is 'dft' in adapter default and 'dct' in second"),
        ({"scale": 1.0}, (*BOTH, "cat"), "scale is None in adapter default and 1.0 in second"),
        ({"modules_to_save": ["lm_head"]}, BOTH, r"second has modules_to_save \['lm_head'\], expected cores alone"),
        (
            {"target_modules": ["q_proj"]},
            (*BOTH, "cat"),
            r"q_proj, model.layers.1.self_attn.q_proj are a stack of adapter second, .* stack_by='role'",
        ),
    ],
)
def test_what_has_no_exact_sum_is_refused_and_changes_nothing(
    make: Make, options: dict[str, Any], arguments: tuple[Any, ...], message: str
) -> None:
    model = make({}, options)
    state = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == state
    assert list(model.peft_config) == ["default", "second"]


def test_a_name_that_ends_like_an_adapted_one_is_not_adapted(adapt: Adapt) -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4), inner), target_modules=r"0", r=1)
    with pytest.raises(ValueError, match=r"would be stack 4x4 of the sum|1\.0 matches the name of an adapted layer"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
