"""Whole models in place: injection, unfreezing, removal, and errors that change nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLayer


def plain_output(model: nn.Module, x: Tensor) -> Tensor:
    """The output with frozen weights: with requires_grad PyTorch may compute a product with other last bits."""
    return copy.deepcopy(model).requires_grad_(False)(x)


def test_the_output_stays_bit_for_bit_and_only_cores_train(network: Any, config: tcur.TCURConfig, x: Tensor) -> None:
    before = plain_output(network, x)
    names = dict(network.named_parameters())
    assert tcur.inject(network, config) is network
    assert torch.equal(plain_output(network, x), before)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == [f"tcur_stacks.{name}.core" for name in ("8x8", "16x8", "8x16")]
    for name, parameter in names.items():
        assert network.get_parameter(name) is parameter, name


def test_slices_are_named_in_order(network: Any, config: tcur.TCURConfig) -> None:
    tcur.inject(network, config)
    stack = tcur.stacks(network)["8x8"]
    qkv, out = "blocks.{}.attn.qkv[{}]", "blocks.{}.attn.out_proj"
    assert stack.names == [n for b in (0, 1) for n in ([qkv.format(b, i) for i in range(3)] + [out.format(b)])]
    layer = network.blocks[1].attn.out_proj
    assert (layer.first_slice, layer.num_slices) == (7, 1)
    assert network.blocks[1].attn.qkv.num_slices == 3
    assert layer.stack is stack is network.blocks[0].attn.qkv.stack


def test_every_layer_computes_its_own_dense_delta(adapted: Any) -> None:
    for name, layer in adapted.named_modules():
        if isinstance(layer, TCURLayer):
            x = torch.randn(3, layer.in_features)
            first, last = layer.first_slice, layer.first_slice + layer.num_slices
            dense = layer.stack.delta_weights()[first:last].flatten(0, 1)
            assert dense.any(), name
            assert_close(layer.delta_weight(), dense, rtol=1e-5, atol=1e-6)
            assert_close(layer(x), nn.functional.linear(x, layer.weight + dense, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
@pytest.mark.parametrize("trainable", ["core", "all"])
@pytest.mark.parametrize("domain", ["slice", "fourier"])
def test_every_form_starts_at_the_base_and_learns(
    network: Any, x: Tensor, transform: str, trainable: str, domain: str
) -> None:
    before = plain_output(network, x)
    config = tcur.TCURConfig(rank=(3, 2), transform=transform, trainable=trainable, core_domain=domain)
    tcur.inject(network, config)
    after = plain_output(network, x)
    if transform == "identity":
        # The blocks of a fused projection are multiplied one by one there: equal up to the order of sums.
        assert_close(after, before, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(after, before)
    network(x).square().sum().backward()
    for stack in tcur.stacks(network).values():
        assert stack.core.grad is not None
        assert bool(stack.core.grad.any())


def test_unfreeze_by_prefix_and_regex(network: Any, config: tcur.TCURConfig) -> None:
    tcur.inject(network, config)
    cores = {name for name, p in network.named_parameters() if p.requires_grad}
    assert tcur.unfreeze(network, ["head", r"blocks\.\d\.attn\.out_proj\.bias"]) is network
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained - cores == {
        "head.weight", "head.bias", "blocks.0.attn.out_proj.bias", "blocks.1.attn.out_proj.bias",
    }  # fmt: skip
    tcur.unfreeze(network, "embed")
    assert network.embed.weight.requires_grad


def test_an_unfreeze_pattern_that_matches_nothing_changes_nothing(
    network: Any, config: tcur.TCURConfig, state_of: Callable[..., Any], assert_unchanged: Callable[..., None]
) -> None:
    tcur.inject(network, config)
    before = state_of(network)
    with pytest.raises(ValueError, match=r"'decoder' matches no parameter; names begin with blocks, embed, head, norm"):
        tcur.unfreeze(network, ["head", "decoder"])
    assert_unchanged(network, before)


def test_an_unfrozen_base_weight_and_bias_get_their_gradients(network: Any, x: Tensor) -> None:
    tcur.inject(network, tcur.TCURConfig(rank=2))
    tcur.unfreeze(network, [""])
    network(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_remove_returns_plain_layers_and_keys(network: Any, config: tcur.TCURConfig, x: Tensor, train: Any) -> None:
    before, keys, y = dict(network.named_parameters()), list(network.state_dict()), plain_output(network, x)
    types = [(name, type(module)) for name, module in network.named_modules()]
    train(tcur.inject(network, config))
    assert tcur.remove(network) is network
    assert [(name, type(module)) for name, module in network.named_modules()] == types
    assert list(network.state_dict()) == keys
    assert all(network.get_parameter(name) is p for name, p in before.items())
    assert torch.equal(plain_output(network, x), y)
    tcur.inject(network, config)  # and it can be adapted again
    assert torch.equal(plain_output(network, x), y)


def test_removing_a_merged_model_keeps_what_was_learned(adapted: Any, x: Tensor) -> None:
    y = adapted(x)
    tcur.remove(tcur.merge(adapted))
    assert not any(isinstance(module, TCURLayer) for module in adapted.modules())
    assert_close(adapted(x), y, rtol=1e-4, atol=1e-5)


def test_a_removed_adapter_leaves_no_trace_in_a_layer(network: Any, config: tcur.TCURConfig) -> None:
    plain = set(vars(nn.Linear(2, 2)))
    tcur.remove(tcur.inject(network, config))
    assert set(vars(network.blocks[0].mlp.linear1)) == plain


@pytest.mark.parametrize("call", [tcur.merge, tcur.unmerge, tcur.remove, tcur.summary])
def test_a_model_without_adapter_is_refused(network: Any, call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="Network is not adapted; call inject"):
        call(network)


BAD = [
    ({"rank": 9}, r"stack 8x8 \(blocks\.0\.attn\.qkv, .*rank \(c, r\) = \(9, 9\) does not fit 8 x 8"),
    ({"rank": (2, 17), "target_modules": ["linear1"]}, r"16x8.*expected c <= 8 and r <= 16"),
    ({"target_modules": ["query"]}, r"\['query'\] match none"),
    ({"target_modules": "norm"}, "expected nn.Linear"),
    ({"split_fused": {"qkv": 7}}, r"blocks\.0\.attn\.qkv: 24 output features"),
    ({"stack_by": lambda name, module: "one"}, "mixes shapes"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_failed_injection_changes_nothing(
    network: Any, options: dict[str, Any], message: str, state_of: Any, assert_unchanged: Any
) -> None:
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        tcur.inject(network, tcur.TCURConfig(**{"rank": 2} | options))
    assert_unchanged(network, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("where", "name"),
    [("blocks.1.mlp.linear2", r"blocks\.1\.mlp\.linear2"), ("blocks.1.attn.qkv", r"blocks\.1\.attn\.qkv\[2\]")],
)
def test_weights_that_are_not_finite_are_named_and_nothing_changes(
    network: Any, value: float, where: str, name: str, state_of: Any, assert_unchanged: Any
) -> None:
    with torch.no_grad():
        network.get_submodule(where).weight[-1, 0] = value
    before = state_of(network)
    with pytest.raises(ValueError, match=f"{name}: 1 of .* weights are NaN or infinite"):
        tcur.inject(network, tcur.TCURConfig(rank=2))
    assert_unchanged(network, before)


@pytest.mark.parametrize("change", ["dtype", "device"])
def test_a_stack_of_mixed_dtypes_or_devices_is_named_and_nothing_changes(
    network: Any, change: str, state_of: Any, assert_unchanged: Any
) -> None:
    network.blocks[1].mlp.linear1.to(**{change: torch.float64 if change == "dtype" else "meta"})
    before = {name: (id(m), type(m)) for name, m in network.named_modules()}
    message = r"16x8: blocks\.1\.mlp\.linear1 is torch\..* expected .* as blocks\.0.*stack_by='none', or stack_blocks=n"
    with pytest.raises(ValueError, match=message):
        tcur.inject(network, tcur.TCURConfig(rank=2))
    assert {name: (id(m), type(m)) for name, m in network.named_modules()} == before


def test_a_second_injection_is_refused_and_changes_nothing(
    adapted: Any, config: tcur.TCURConfig, state_of: Any, assert_unchanged: Any
) -> None:
    before = state_of(adapted)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv of Network is adapted already; call remove"):
        tcur.inject(adapted, config)
    assert_unchanged(adapted, before)


@pytest.mark.parametrize("inside", [True, False])
def test_a_part_of_an_adapted_model_or_around_it_is_refused(
    adapted: Any, config: tcur.TCURConfig, inside: bool
) -> None:
    model = adapted.blocks if inside else nn.ModuleDict({"inner": adapted, "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(ValueError, match="adapted already"):
        tcur.inject(model, config)


def test_an_adapted_model_inside_another_is_found(adapted: Any) -> None:
    outer = nn.Sequential(adapted)
    assert list(tcur.stacks(outer)) == ["8x8", "16x8", "8x16"]
    tcur.unmerge(tcur.merge(outer))
    tcur.remove(outer)
    assert not any(isinstance(module, TCURLayer) for module in outer.modules())


def test_a_sequential_root_still_works() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    y = model(x)
    tcur.inject(model, tcur.TCURConfig(rank=1, target_modules=["0", "2"]))
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert list(tcur.stacks(model)) == ["4x4"]
    tcur.remove(model)
    assert len(model) == 3


def test_a_module_under_two_names_is_replaced_in_both_and_is_one_slice() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(OrderedDict(a=shared, b=nn.Linear(4, 4), c=shared, d=nn.Sequential(OrderedDict(e=shared))))
    x = torch.randn(2, 4)
    y = model(x)
    tcur.inject(model, tcur.TCURConfig(rank=1, target_modules=["a", "b", "c", "e"]))
    assert isinstance(model.a, tcur.TCURLinear)
    assert model.a is model.c is model.d.e
    assert tcur.stacks(model)["4x4"].slices == 2
    assert torch.equal(model(x), y)
    tcur.remove(model)
    assert model.a is model.c is model.d.e
    assert type(model.a) is nn.Linear
    assert torch.equal(model(x), y)


def test_a_core_of_the_wrong_model_is_not_reached_through_a_copy_of_the_config() -> None:
    """Two models adapted with one configuration share nothing."""
    config = tcur.TCURConfig(rank=1, target_modules=["0"])
    first, second = (tcur.inject(nn.Sequential(nn.Linear(4, 4)), config) for _ in range(2))
    next(iter(tcur.stacks(first).values())).set_core_slices(torch.ones(1, 1, 1))
    assert not next(iter(tcur.stacks(second).values())).core.any()


def test_a_linear_layer_as_the_whole_model_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="match none"):
        tcur.inject(nn.Linear(4, 4), tcur.TCURConfig(rank=1, target_modules=".*"))


def test_injecting_takes_no_part_of_the_random_state(network: Any, config: tcur.TCURConfig) -> None:
    before = torch.get_rng_state()
    tcur.inject(network, config)
    assert torch.equal(before, torch.get_rng_state())
