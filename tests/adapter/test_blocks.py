"""Which layers are adapted where a configuration names none, as what, and what is said of the others."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.config import DEFAULT_SPLIT
from tcurlora_ext.adapter.model.blocks import left_out_by_default, not_called, repeated_names
from tcurlora_ext.adapter.model.coverage import CONVOLUTION, EXPERTS
from tcurlora_ext.adapter.model.fused import parts_of
from tcurlora_ext.adapter.model.targets import find_targets


def named(**layers: tuple[int, int]) -> dict[str, nn.Module]:
    """Linear layers (out, in) by name; __ stands for a dot."""
    return {name.replace("__", "."): nn.Linear(i, o, bias=False) for name, (o, i) in layers.items()}


def model_of(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model with these modules under these names."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
    return root


def reason(name: str, layers: Mapping[str, nn.Module], rank: int = 2) -> str:
    return left_out_by_default(layers, model_of(layers), rank)[name]


BLOCKS = named(b__0__fc=(4, 4), b__1__fc=(4, 4))


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        (["b.0.fc", "b.1.fc"], ["b.0.fc", "b.1.fc"]),
        (["b.0.fc", "c.1.fc"], []),  # other paths
        (["b.0", "b.1"], []),  # the layers of an nn.Sequential are no blocks
        (["b.0.mlp.0", "b.0.mlp.2", "b.1.mlp.0"], ["b.0.mlp.0", "b.0.mlp.2", "b.1.mlp.0"]),  # one has a layer more
        (["b.0.fc", "b.1.other"], []),  # two parts with nothing in common
        (["s.0.b.0.fc", "s.1.b.0.fc", "s.0.down"], ["s.0.b.0.fc", "s.1.b.0.fc", "s.0.down"]),  # stages
        (["b.layer_0.fc", "b.layer_1.fc"], ["b.layer_0.fc", "b.layer_1.fc"]),  # torchvision's
        (["layers1.fc", "layers2.fc"], []),  # SwinUNETR's stages, whose merging layers it leaves out
    ],
)
def test_a_block_is_repeated_where_another_has_a_layer_in_common_with_it(names: list[str], repeated: list[str]) -> None:
    assert repeated_names(names) == set(repeated)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("b.2.fc", ""),
        ("stem", "outside repeated blocks"),
        ("mlp.fc1", ""),  # a known name in a single block
        ("b.2.class_head", "a head"), ("b.2.head.fc", "a head"), ("classifier.fc", "a head"),
        ("b.2.multihead.fc", ""),  # in whole words
        ("b.2.pos_embed", "an embedding"), ("b.2.embeddings.fc", "an embedding"),
        ("b.2.router.fc", "a router"), ("b.2.router.classifier", "a router"),
        ("b.2.gate", ""),  # no experts beside it
    ],
)  # fmt: skip
def test_names_settle_doubts(name: str, said: str) -> None:
    assert reason(name, {**BLOCKS, **named(b__2__fc=(4, 4)), name: nn.Linear(4, 4)}) == said


def test_a_gate_beside_experts_is_a_router_and_a_narrow_one_is_left_out() -> None:
    layers = {**BLOCKS, **named(b__0__gate=(4, 4), b__0__experts__0__fc=(4, 4), b__0__shared_gate=(1, 4))}
    assert reason("b.0.gate", layers) == "a router"
    assert reason("b.0.shared_gate", layers) == "narrower than the rank 2"
    assert reason("b.0.shared_gate", layers, rank=1) == ""
    config = tcur.TCURConfig(rank=(1, 2))  # the larger of both
    assert "b.0.shared_gate" not in {target.name for target in find_targets(model_of(layers), config)}


def test_layers_that_their_parent_does_not_call_are_left_out() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(
        ValueError, match=r"adapts none of the 4 linear layers .*layers\.0\.linear1 is left out: layers\.0 is an nn"
    ):
        tcur.inject(encoder, tcur.TCURConfig(rank=2))
    both = nn.ModuleDict({"encoder": encoder, "b": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "12")})
    tcur.inject(both, tcur.TCURConfig(rank=2))
    reasons = {part.name: part.reason for part in tcur.summary(both).covers.left_out}
    assert "nn.TransformerEncoderLayer" in reasons["encoder.layers.0.linear1"]
    assert "nn.MultiheadAttention reads its weight" in reasons["encoder.layers.0.self_attn.out_proj"]


def test_a_parent_that_reads_its_weights_is_known_by_its_class() -> None:
    transformers = pytest.importorskip("transformers")
    attention = transformers.models.wavlm.modeling_wavlm.WavLMAttention(8, 2)
    assert set(not_called(attention)) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    tcur.inject(attention, tcur.TCURConfig(rank=2, target_modules=["q_proj"]))
    counters.clear()  # other tests of this process compile, after which calls leave no mark
    with pytest.warns(UserWarning, match="q_proj .* never called"):
        attention(torch.randn(1, 3, 8))


def test_cross_attention_that_a_block_of_monai_does_not_call_is_left_out() -> None:
    blocks = {f"b.{i}.{name}": nn.Linear(8, 8) for i in (0, 1) for name in ("cross_attn.to_q", "mlp.linear1")}
    model = model_of(blocks)
    for block in (model.b.get_submodule("0"), model.b.get_submodule("1")):
        block.with_cross_attention = False
    found = [target.name for target in find_targets(model, tcur.TCURConfig(rank=2))]
    assert found == ["b.0.mlp.linear1", "b.1.mlp.linear1"]


@pytest.mark.parametrize(
    ("name", "shape", "slices"),
    [
        ("a.qkv", (24, 8), 3), ("a.qkv", (48, 8), 3), ("a.qkv", (25, 8), 1),
        ("c_attn", (24, 8), 3), ("c_attn", (12, 8), 1),  # one key and value head for all: StarCoder
        ("Wqkv", (24, 8), 3), ("Wqkv", (18, 8), 1), ("qkv_proj", (24, 8), 3), ("qkv_proj", (16, 8), 1),
        ("kv", (16, 8), 2), ("gate_up_proj", (32, 8), 2), ("Wi", (32, 8), 2),
        ("query_key_value", (24, 8), 1),  # rows in the order of heads
        ("q_proj", (24, 8), 1),
    ],
)  # fmt: skip
def test_fused_projections_by_name_and_shape(name: str, shape: tuple[int, int], slices: int) -> None:
    assert parts_of(name, shape, DEFAULT_SPLIT) == slices


def test_a_split_that_is_asked_for_is_required() -> None:
    assert parts_of("a.query_key_value", (24, 8), {"query_key_value": 3}) == 3
    assert parts_of("a.qkv", (24, 8), {}) == 1
    with pytest.raises(ValueError, match=r"a\.qkv: 25 output features do not split into 3 equal slices"):
        parts_of("a.qkv", (25, 8), {"qkv": 3})


# -- subclasses -------------------------------------------------------------------------------------------------------


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does, with a method that its parent calls."""

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class WithNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ModuleList(nn.ModuleDict({"fc": Named(6, 6)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.b:
            x = block["fc"].doubled(x)
        return x


def reloaded(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_a_subclass_stays_one_and_comes_back(copied: Callable[[nn.Module], nn.Module], train: Any) -> None:
    model, x = WithNamed(), torch.randn(3, 6)
    plain = model(x)
    tcur.inject(model, tcur.TCURConfig(rank=2))
    assert isinstance(model.b[0]["fc"], Named)
    assert isinstance(model.b[0]["fc"], tcur.TCURLinear)
    assert_close(model(x), plain)
    train(model)
    again = copied(model)
    assert torch.equal(again(x), model(x))
    y = model(x)
    assert not torch.allclose(y, plain)
    tcur.remove(tcur.merge(model))
    assert type(model.b[0]["fc"]) is Named
    assert_close(model(x), y)


# -- what is said -----------------------------------------------------------------------------------------------------


def experts() -> nn.Module:
    """Two blocks with a linear layer, a convolution and experts in one parameter each; and a head."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(4, 6, 6))

    def block() -> nn.Module:
        return nn.ModuleDict({"fc": nn.Linear(6, 6), "conv": nn.Conv3d(2, 2, 3), "experts": Experts()})

    return nn.ModuleDict({"b": nn.ModuleList(block() for _ in range(2)), "lm_head": nn.Linear(6, 5)})


def test_what_is_left_out_is_named_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tcurlora_ext")
    model = tcur.inject(experts(), tcur.TCURConfig(rank=2))
    covers = tcur.summary(model).covers
    assert {part.name: part.reason for part in covers.parts if not part.slices} == {
        "b.0.conv": CONVOLUTION, "b.0.experts.down_proj": EXPERTS, "b.1.conv": CONVOLUTION,
        "b.1.experts.down_proj": EXPERTS, "lm_head": "a head",
    }  # fmt: skip
    assert covers.share == 72 / 102
    assert covers.share_of_all == 72 / (102 + 2 * 108 + 2 * 144)
    line = "adapted: 2 of 3 linear layers, 71% of their weights; left out: lm_head (a head); "
    line += f"216 weights that are {CONVOLUTION}; 288 weights that are {EXPERTS}"
    assert str(covers) == line
    assert caplog.messages == [f"ModuleDict: {line}"]
    assert str(tcur.summary(model)).endswith(line)


def test_groups_are_of_one_name_and_one_reason() -> None:
    model = tcur.inject(experts(), tcur.TCURConfig(rank=2, exclude_modules=["b.1.fc"]))
    groups = {(g.name, g.slices): (g.layers, g.weights, g.reason) for g in tcur.summary(model).covers.groups()}
    assert groups["b.*.fc", 1] == (1, 36, "")
    assert groups["b.*.fc", 0] == (1, 36, "in exclude_modules")
    assert groups["b.*.conv", 0] == (2, 216, CONVOLUTION)


def test_a_tied_output_layer_is_counted_once() -> None:
    model = experts()
    model.add_module("embedding", nn.Embedding(5, 6))
    model.embedding.weight = model.lm_head.weight
    tcur.inject(model, tcur.TCURConfig(rank=2))
    assert "embedding" not in {part.name for part in tcur.summary(model).covers.parts}
