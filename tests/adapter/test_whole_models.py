"""MONAI's and transformers' models with the default configuration; small, random weights, nothing is downloaded."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURConv1D, TCURLayer

Make = Callable[[], tuple[nn.Module, dict[str, Any]]]


@dataclass(frozen=True)
class Expected:
    """``stacks``: (out, in) of a slice and number of slices of every stack; ``layers``: adapted modules."""

    make: Make
    layers: int
    stacks: list[tuple[tuple[int, int], int]]


def unetr() -> tuple[nn.Module, dict[str, Any]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.UNETR(1, 2, (16, 16, 16), feature_size=4, hidden_size=12, mlp_dim=24, num_heads=2)
    return model, {"x_in": torch.randn(1, 1, 16, 16, 16)}


def swin_unetr() -> tuple[nn.Module, dict[str, Any]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.SwinUNETR(1, 2, feature_size=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4), spatial_dims=2)
    return model, {"x_in": torch.randn(1, 1, 64, 64)}


def monai_vit() -> tuple[nn.Module, dict[str, Any]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ViT(
        1, (8, 8, 8), (4, 4, 4), hidden_size=16, mlp_dim=32, num_layers=3, num_heads=2, classification=True
    )
    return model, {"x": torch.randn(1, 1, 8, 8, 8)}


def of_transformers(name: str, config: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> Make:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options)), inputs()

    return make


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 40, (2, 7))}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 8, 8)}


def pair() -> dict[str, Any]:
    return tokens() | image()


TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1}

MODELS = {
    # 12 blocks of fused qkv and out_proj: 4 slices each; linear1; linear2.
    "UNETR": Expected(unetr, 48, [((12, 12), 48), ((24, 12), 12), ((12, 24), 12)]),
    # Stages of width 12, 24, 48, 96, two blocks each.
    "SwinUNETR": Expected(
        swin_unetr, 32,
        [s for d in (12, 24, 48, 96) for s in (((d, d), 8), ((4 * d, d), 2), ((d, 4 * d), 2))],
    ),
    "ViT of MONAI": Expected(monai_vit, 12, [((16, 16), 12), ((32, 16), 3), ((16, 32), 3)]),
    "ViT": Expected(
        of_transformers("ViTModel", "ViTConfig", image, **VISION, num_attention_heads=4),
        12, [((16, 16), 8), ((24, 16), 2), ((16, 24), 2)],
    ),
    "BERT": Expected(
        of_transformers("BertModel", "BertConfig", tokens, **TEXT), 12, [((16, 16), 8), ((32, 16), 2), ((16, 32), 2)],
    ),
    "CLIP": Expected(
        of_transformers(
            "CLIPModel", "CLIPConfig", pair, projection_dim=8,
            text_config=TEXT | {"max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
            vision_config=VISION | {"num_attention_heads": 4},
        ),
        24, [((16, 16), 8), ((32, 16), 2), ((16, 32), 2), ((16, 16), 8), ((24, 16), 2), ((16, 24), 2)],
    ),
    # Grouped queries: k and v are half as wide and a stack of their own; gate and up share one.
    "Llama": Expected(
        of_transformers("LlamaForCausalLM", "LlamaConfig", tokens, **TEXT, num_key_value_heads=2),
        14, [((16, 16), 4), ((8, 16), 4), ((32, 16), 4), ((16, 32), 2)],
    ),
    "Qwen2": Expected(
        of_transformers("Qwen2ForCausalLM", "Qwen2Config", tokens, **TEXT, num_key_value_heads=2),
        14, [((16, 16), 4), ((8, 16), 4), ((32, 16), 4), ((16, 32), 2)],
    ),
    "GPT-2": Expected(
        of_transformers("GPT2LMHeadModel", "GPT2Config", tokens, **GPT2),
        8, [((16, 16), 8), ((64, 16), 2), ((16, 64), 2)],
    ),
}  # fmt: skip
CONFIG = tcur.TCURConfig(rank=2)


@pytest.fixture(params=MODELS, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Expected, nn.Module, dict[str, Any]]]:
    """A frozen model in eval mode and its inputs, built once; tests use copies."""
    torch.manual_seed(0)
    expected = MODELS[request.param]
    model, inputs = expected.make()
    return expected, model.eval().requires_grad_(False), inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """One tensor that depends on every part of the model."""
    result = model(**inputs)
    tensors = result.to_tuple() if hasattr(result, "to_tuple") else result
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.flatten())
        elif isinstance(value, (tuple, list)):
            for item in value:
                collect(item)

    collect(tensors)
    return torch.cat(found)


def test_the_stacks_are_those_of_the_architecture(case: Any) -> None:
    expected, plain, _ = case
    model = tcur.inject(copy.deepcopy(plain), CONFIG)
    found = Counter((stack.shape, stack.slices) for stack in tcur.stacks(model).values())
    assert found == Counter(expected.stacks)
    layers = [module for module in model.modules() if isinstance(module, TCURLayer)]
    assert len(layers) == expected.layers
    for stack in tcur.stacks(model).values():
        assert len(stack.names) == stack.slices
        assert sum(layer.num_slices for layer in layers if layer.stack is stack) == stack.slices


def test_before_training_the_output_is_the_base_bit_for_bit(case: Any) -> None:
    _, plain, inputs = case
    model = tcur.inject(copy.deepcopy(plain), CONFIG).requires_grad_(False)
    assert torch.equal(output(model, inputs), output(plain, inputs))


def test_one_step_moves_every_core_and_no_base_weight(case: Any) -> None:
    _, plain, inputs = case
    model = tcur.inject(copy.deepcopy(plain), CONFIG)
    before = output(model, inputs).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    output(model, inputs).square().sum().backward()
    optimizer.step()
    for name, stack in tcur.stacks(model).items():
        assert bool(stack.core.any()), name
        assert bool(stack.delta_weights().flatten(1).any(1).all()), name
    after = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        assert torch.equal(after[name], value), name
    assert not torch.equal(output(model, inputs), before)


@pytest.fixture
def trained(case: Any) -> nn.Module:
    model = tcur.inject(copy.deepcopy(case[1]), CONFIG)
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.1 * torch.randn(stack.core.shape))
    return model.requires_grad_(False)


def test_save_and_load_give_the_same_bits(case: Any, trained: nn.Module, tmp_path: Path) -> None:
    _, plain, inputs = case
    tcur.save_adapter(trained, tmp_path)
    other = tcur.load_adapter(copy.deepcopy(plain), tmp_path).requires_grad_(False)
    y = output(trained, inputs)
    assert torch.equal(output(other, inputs), y)
    assert not torch.equal(output(plain, inputs), y)


def test_merge_is_the_same_function_and_unmerge_the_same_bits(case: Any, trained: nn.Module) -> None:
    _, plain, inputs = case
    y = output(trained, inputs)
    merged = output(tcur.merge(trained), inputs)
    # float32 through two to twelve blocks and the norms of a decoder, relative to the size of the output.
    assert float((merged - y).norm() / y.norm()) < 1e-4
    assert float((output(plain, inputs) - y).norm() / y.norm()) > 1e-3
    tcur.unmerge(trained)
    assert torch.equal(output(trained, inputs), y)
    for name, value in plain.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name


def test_remove_gives_the_plain_model_back(case: Any, trained: nn.Module) -> None:
    _, plain, inputs = case
    tcur.remove(trained)
    assert list(trained.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in trained.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(output(trained, inputs), output(plain, inputs))


def test_every_layer_is_its_dense_delta(case: Any, trained: nn.Module) -> None:
    """Also for GPT-2, which stores its weights transposed."""
    for name, layer in trained.named_modules():
        if isinstance(layer, TCURLayer):
            matrix = layer.weight.T if isinstance(layer, TCURConv1D) else layer.weight
            x = torch.randn(3, matrix.shape[1])
            expected = nn.functional.linear(x, matrix + layer.delta_weight(), layer.bias)
            assert_close(layer(x), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_towers_have_stacks_of_their_own() -> None:
    model, _ = MODELS["CLIP"].make()
    tcur.inject(model, CONFIG)
    for name, stack in tcur.stacks(model).items():
        towers = {slice_name.split(".")[0] for slice_name in stack.names}
        assert len(towers) == 1, name
        assert towers.pop() in name


def test_the_fused_projection_of_unetr_is_three_slices_in_the_order_q_k_v() -> None:
    """Each block of rows is changed by its own slice alone."""
    model, _ = unetr()
    tcur.inject(model, CONFIG)
    layer: Any = model.get_submodule("vit.blocks.3.attn.qkv")
    names = layer.stack.names[layer.first_slice : layer.first_slice + 3]
    assert names == [f"vit.blocks.3.attn.qkv[{i}]" for i in range(3)]
    layer.stack.set_core_slices(torch.randn(layer.stack.core.shape))
    delta = layer.stack.delta_weights()
    x = torch.randn(4, 12)
    change = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    for i in range(3):
        expected = x @ delta[layer.first_slice + i].T
        assert_close(change[:, 12 * i : 12 * (i + 1)], expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def paper() -> nn.Module:
    """The paper's network: UNETR with a ViT-B, rank 8."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    return tcur.inject(nets.UNETR(1, 2, (32, 32, 32)), tcur.TCURConfig(rank=8))


def test_the_paper_setting_has_three_stacks_and_4608_parameters(paper: nn.Module) -> None:
    summary = tcur.summary(paper)
    assert {(s.slices, s.shape, s.rank) for s in summary.stacks} == {
        (48, (768, 768), (8, 8)), (12, (3072, 768), (8, 8)), (12, (768, 3072), (8, 8)),
    }  # fmt: skip
    assert len(summary.stacks) == 3
    assert summary.trained == 4608
    assert sum(p.numel() for p in paper.parameters() if p.requires_grad) == 4608


def test_the_paper_setting_fits_a_small_file(paper: nn.Module, tmp_path: Path) -> None:
    """4,608 float32 parameters take 18 KiB; indices, names and fingerprints are added to that."""
    assert tcur.save_adapter(paper, tmp_path).stat().st_size < 64 * 1024


def test_the_decoder_of_the_paper_can_train_too(paper: nn.Module) -> None:
    tcur.unfreeze(paper, ["decoder", "out"])
    trained = {name.split(".")[0] for name, p in paper.named_parameters() if p.requires_grad}
    assert trained == {"tcur_stacks", "decoder2", "decoder3", "decoder4", "decoder5", "out"}
    # By count, the paper's 2.683 M: the decoder's 2.6785 M and the cores.
    assert tcur.summary(paper).trained == pytest.approx(2.683e6, rel=1e-3)
