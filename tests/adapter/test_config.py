"""The configuration: what it refuses and how it is converted to JSON and back."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest

import tcurlora_ext as tcur
from tcurlora_ext.adapter.config import pair_of


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0), ("rank", -1), ("rank", 2.0), ("rank", True), ("rank", (1, 2, 3)), ("rank", (0, 2)),
        ("stack_by", "width"), ("selection", "biggest"), ("trainable", "none"), ("transform", "fft"),
        ("core_domain", "time"), ("stack_blocks", 0), ("stack_blocks", 1.0),
        ("frequencies", 0), ("budget", 0), ("budget", 10.0), ("dropout", 1.0), ("dropout", -0.1),
        ("dropout", float("nan")), ("dropout", True), ("rank_pattern", {"a": 0}), ("rank_pattern", {"(": 1}),
        ("split_fused", {"qkv": 0}), ("split_fused", {"qkv": 1.5}),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_what_was_found(option: str, value: Any) -> None:
    found = re.escape(next(iter(value)) if isinstance(value, dict) else repr(value))
    with pytest.raises(ValueError, match=f"{option}.*{found}"):
        tcur.TCURConfig(**{option: value})


def test_a_rank_is_a_number_or_a_pair() -> None:
    assert pair_of(8) == (8, 8)
    assert pair_of((3, 2)) == (3, 2)


@pytest.mark.parametrize(
    "config",
    [
        tcur.TCURConfig(),
        tcur.TCURConfig(rank=(3, 2), target_modules=["a", "b"], exclude_modules="c.*", stack_by="role", scale=0.5),
        tcur.TCURConfig(target_modules=("a",), split_fused={}, transform="dct", core_domain="slice", seed=3, alpha=2.0),
    ],
)
def test_a_configuration_survives_json(config: tcur.TCURConfig) -> None:
    again = tcur.TCURConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again.to_json() == config.to_json()
    assert pair_of(again.rank) == pair_of(config.rank)


@pytest.mark.parametrize("stack_by", ["none", lambda name, module: name])
def test_only_stacks_by_shape_or_role_are_cut_into_blocks(stack_by: Any) -> None:
    with pytest.raises(ValueError, match="stack_blocks cuts stacks by 'shape' or 'role', found stack_by"):
        tcur.TCURConfig(stack_by=stack_by, stack_blocks=2)


def test_a_budget_or_ranks_by_name() -> None:
    with pytest.raises(ValueError, match=r"budget is 100 and rank_pattern \{'a': 2\}: expected one of the two"):
        tcur.TCURConfig(budget=100, rank_pattern={"a": 2})


def test_raw_factors_have_no_rule_to_stabilise() -> None:
    with pytest.raises(ValueError, match=r"rank_stabilised changes the default scale rule, found scale 1\.0, not None"):
        tcur.TCURConfig(scale=1.0, rank_stabilised=True)


@pytest.mark.parametrize("options", [{"transform": "dct"}, {"transform": "identity"}, {"core_domain": "slice"}])
def test_low_frequencies_are_those_of_a_core_in_the_fourier_domain(options: dict[str, Any]) -> None:
    found = next(iter(options.values()))
    expected = "frequencies is 2, expected transform 'dft' and core_domain 'fourier' with it"
    with pytest.raises(ValueError, match=f"{expected}, found transform .*'{found}'"):
        tcur.TCURConfig(frequencies=2, **options)


def test_a_function_for_stacks_leaves_its_name() -> None:
    def by_depth(name: str, module: object) -> object:
        return name

    values = tcur.TCURConfig(stack_by=by_depth).to_json()
    assert values["stack_by"] == "by_depth"
    assert tcur.TCURConfig.from_json(values).stack_by == "shape"


def test_unknown_entries_are_named() -> None:
    with pytest.raises(ValueError, match="unknown entries drop_path"):
        tcur.TCURConfig.from_json({"drop_path": 0.1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alpha": 16}, r"lora_alpha is an option of LoRA; here it is alpha, a factor of the default scale"),
        ({"lora_dropout": 0.1}, "here it is dropout"),
        ({"r": 4}, "here it is rank"),
        ({"modules_to_save": ["head"]}, r"here it is unfreeze\(model"),
    ],
)
def test_lora_names_are_explained(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        tcur.TCURConfig(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        tcur.TCURConfig(ranks=3)  # type: ignore[call-arg]


def test_an_alpha_as_large_as_a_lora_alpha_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"alpha is 16: .* the step is then 16 times as long"):
        tcur.TCURConfig(alpha=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tcur.TCURConfig(alpha=4)
        tcur.TCURConfig(alpha=16, scale=1.0)
