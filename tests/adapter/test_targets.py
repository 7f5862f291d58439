"""Which modules are found and how they form stacks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.targets import DEFAULT_TARGETS, find_targets, group, matches


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit.blocks.0.attn.qkv", True), ("vit.blocks.0.attn.out_proj", True), ("vit.blocks.0.mlp.linear1", True),
        ("swinViT.layers1.0.blocks.1.attn.proj", True), ("layers.3.self_attn.q_proj", True),
        ("layers.3.mlp.gate_proj", True), ("vit.layers.0.attention.o_proj", True), ("vit.layers.0.mlp.fc2", True),
        ("encoder.layer.0.attention.self.query", True), ("encoder.layer.0.attention.output.dense", True),
        ("encoder.layer.0.intermediate.dense", True), ("encoder.layer.0.output.dense", True),
        ("h.0.attn.c_attn", True), ("h.0.mlp.c_proj", True),
        ("pooler.dense", False), ("swinViT.layers1.0.downsample.reduction", False), ("lm_head", False),
        ("vit.patch_embedding.patch_embeddings", False), ("classifier", False), ("visual_projection", False),
    ],
)  # fmt: skip
def test_the_default_targets(name: str, wanted: bool) -> None:
    assert matches(name, DEFAULT_TARGETS) is wanted


def test_names_match_in_whole_components_and_a_regex_the_whole_name() -> None:
    assert matches("a.b.linear", ["linear"])
    assert matches("a.b.linear", ["b.linear"])
    assert not matches("a.b.mylinear", ["linear"])
    assert not matches("a.b.linear.x", ["linear"])
    assert matches("a.b.linear", r".*\.linear")
    assert not matches("a.b.linear", "linear")
    assert not matches("a", None)


def stack_names(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    config = tcur.TCURConfig(rank=2, **options)
    return {key: [t.name for t in members] for key, members in group(find_targets(model, config), config).items()}


def test_stacks_by_shape(network: nn.Module) -> None:
    found = stack_names(network)
    assert found == {
        "8x8": ["blocks.0.attn.qkv", "blocks.0.attn.out_proj", "blocks.1.attn.qkv", "blocks.1.attn.out_proj"],
        "16x8": ["blocks.0.mlp.linear1", "blocks.1.mlp.linear1"],
        "8x16": ["blocks.0.mlp.linear2", "blocks.1.mlp.linear2"],
    }


def test_stacks_by_role_alone_and_by_function(network: nn.Module) -> None:
    assert sorted(map(len, stack_names(network, stack_by="role").values())) == [2, 2, 2, 2]
    assert [len(members) for members in stack_names(network, stack_by="none").values()] == [1] * 8
    by_block = stack_names(network, stack_by=lambda name, module: (name.split(".")[1], tuple(module.weight.shape)))
    assert len(by_block) == 8
    assert len(set(by_block)) == 8
    assert not any("." in name for name in by_block)


def test_stacks_in_runs_of_blocks(make_network: Any) -> None:
    network = make_network(depth=5)
    by_shape = stack_names(network, stack_blocks=2)
    assert len(by_shape) == 9
    assert by_shape["blocks_0_8x8"] == [f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "out_proj")]
    assert by_shape["blocks_2_16x8"] == ["blocks.4.mlp.linear1"]  # 2 does not divide 5
    by_role = stack_names(network, stack_by="role", stack_blocks=3)
    assert sorted(map(len, by_role.values())) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert not any("." in name for name in by_role)
    assert stack_names(network, stack_blocks=5) == stack_names(network)


def test_a_run_of_blocks_counts_the_blocks_that_are_adapted(make_network: Any) -> None:
    """stack_blocks=2 means two blocks that are adapted, also where every other block is excluded."""
    found = stack_names(make_network(depth=8), target_modules=r"blocks\.[0246]\.mlp\.linear1", stack_blocks=2)
    assert [[name.split(".")[1] for name in names] for names in found.values()] == [["0", "2"], ["4", "6"]]


def test_a_projection_that_is_not_split_keeps_its_own_shape(network: nn.Module) -> None:
    found = stack_names(network, split_fused={})
    assert found["24x8"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_exclusion_wins(network: nn.Module) -> None:
    found = stack_names(network, exclude_modules=["mlp.linear1", "out_proj"])
    assert set(found) == {"8x8", "8x16"}
    assert found["8x8"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_towers_apart() -> None:
    towers = nn.ModuleDict({side: nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]) for side in ("left", "right")})
    found = stack_names(towers, target_modules=r".*\.\d")
    assert [len(members) for members in found.values()] == [3, 3]
    assert ["left" in name for name in found] == [True, False]


def test_a_stack_of_mixed_shapes_is_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"mixes shapes: blocks\.0\.attn\.qkv is \(8, 8\), .*linear1 is \(16, 8\)"):
        stack_names(network, stack_by=lambda name, module: 0)


def test_a_fused_projection_that_does_not_split_is_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv: 24 output features do not split into 5"):
        stack_names(network, split_fused={"qkv": 5})


def test_nothing_matched_says_what_is_there(network: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"\['query'\] match none of the 10 linear layers and convolutions of Network, such as embed"
    ):
        stack_names(network, target_modules=["query"])


def test_only_other_kinds_matched_says_which(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"match 1 modules, such as norm,.*found BatchNorm1d, expected nn\.Linear"):
        stack_names(network, target_modules=["norm"])


def test_a_replaced_forward_is_refused(network: Any) -> None:
    layer = network.blocks[1].mlp.linear1
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.linear1 cannot be adapted: its forward was replaced"):
        stack_names(network)
