"""torch.export and ONNX: exported with the operator, as PyTorch operations, and merged; run by torch or onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur


def vit() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.ViT(1, (8, 8, 8), (4, 4, 4), hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2)


class First(nn.Module):
    """MONAI's ViT without its second result, the tokens of every block: exported files have one output here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vit = model

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)[0]


@pytest.fixture
def model(train: Callable[..., Any]) -> nn.Module:
    return train(tcur.inject(First(vit()).eval(), tcur.TCURConfig(rank=2))).requires_grad_(False)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 1, 8, 8, 8)


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapted_model_is_exported_with_the_operator(model: nn.Module, strict: bool, tmp_path: Path) -> None:
    program = exported(model, strict)
    assert "tcurlora.linear.default" in operators(program)
    torch.export.save(program, tmp_path / "model.pt2")
    for form in (program, program.run_decompositions(), torch.export.load(tmp_path / "model.pt2")):
        for batch in (1, 3):
            x = images(batch)
            assert_close(form.module()(x), model(x))


@pytest.mark.parametrize(("merged", "strict"), [(False, True), (False, False), (True, False)])
def test_a_plain_copy_is_exported_without_it(model: nn.Module, merged: bool, strict: bool) -> None:
    program = exported(tcur.plain_copy(model, merged), strict)
    for form in (program, program.run_decompositions()):
        assert not any("tcurlora" in name for name in operators(form))
        assert not any(name.startswith(("aten.cos", "aten.sin", "aten.arange")) for name in operators(form))
        for batch in (1, 3):
            x = images(batch)
            assert_close(form.module()(x), model(x), rtol=1e-4, atol=1e-5)


def to_onnx(model: nn.Module, path: Path, x: Tensor | None = None, **options: Any) -> Any:
    """A session of onnxruntime on the exported file."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    options = {"dynamic_shapes": ({0: "batch"},), **options}
    torch.onnx.export(model, (images(2) if x is None else x,), path, dynamo=True, external_data=False, **options)
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: Any, x: Tensor) -> Tensor:
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def test_onnxruntime_computes_the_same_merged_or_not(model: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    sizes = {}
    for merged in (True, False):
        path = tmp_path / f"{merged}.onnx"
        session = to_onnx(tcur.plain_copy(model, merged), path)
        for batch in (1, 2, 5):
            x = images(batch)
            assert_close(run(session, x), model(x), rtol=1e-5, atol=1e-5)
        graph = onnx.load(path).graph
        # PyTorch's own domain would need its operators there.
        assert {node.domain for node in graph.node} == {""}
        sizes[merged] = sum(tensor.ByteSize() for tensor in graph.initializer)
    # The unmerged file has col and row of every stack once, not once per layer; the blocks of B take at most twice
    # the core per slice.
    stacks = tcur.stacks(model).values()
    own = sum(4 * (stack.col.numel() + stack.row.numel()) for stack in stacks)
    blocks = sum(4 * 2 * stack.core.numel() * stack.slices for stack in stacks)
    assert own < sizes[False] - sizes[True] < own + blocks + 4096


def test_onnxruntime_computes_a_language_model_of_any_length(train: Callable[..., Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, use_cache=False, **sizes)).eval()
    model = train(tcur.inject(llama, tcur.TCURConfig(rank=2, target_modules=["q_proj", "v_proj"])))
    tokens = torch.randint(40, (2, 7))
    torch.onnx.export(
        tcur.plain_copy(model), (tokens,), tmp_path / "model.onnx", dynamo=True, external_data=False,
        dynamic_shapes={"input_ids": {0: "batch", 1: "length"}},
    )  # fmt: skip
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 7), (3, 5), (1, 12)):
        tokens = torch.randint(40, shape)
        assert_close(run(session, tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)


PICTURES = {0: "batch", 2: "height", 3: "width"}  # all dimensions but the channels


@pytest.fixture
def convolutions() -> nn.Module:
    """Two stacks: two convolutions, of which one pads its input by itself, and two transposed ones."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
        nn.ConvTranspose2d(4, 4, 3),
    )
    tcur.inject(model.eval(), tcur.TCURConfig(rank=2, target_modules=["0", "1", "2", "3"]))
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            stack.core.normal_()
    return model.requires_grad_(False)


@pytest.mark.parametrize("plain", [False, True])
def test_convolutions_are_exported_for_any_batch_and_size(convolutions: nn.Module, plain: bool) -> None:
    model = tcur.plain_copy(convolutions) if plain else convolutions
    dimensions = {dim: torch.export.Dim(name, min=1, max=64) for dim, name in PICTURES.items()}
    program = torch.export.export(model, (torch.randn(2, 4, 6, 5),), dynamic_shapes=(dimensions,))
    for shape in ((3, 4, 6, 5), (1, 4, 8, 9)):
        x = torch.randn(shape)
        assert_close(program.module()(x), convolutions(x))


def test_traced_convolutions_take_another_batch(convolutions: nn.Module) -> None:
    traced = torch.jit.trace(tcur.plain_copy(convolutions), (torch.randn(2, 4, 6, 5),))
    x = torch.randn(3, 4, 7, 8)
    # By other operations, whose rounding reached 1.1e-5.
    assert_close(traced(x), convolutions(x), rtol=1e-4, atol=1e-4)


def test_onnxruntime_computes_convolutions_of_any_batch_and_size(convolutions: nn.Module, tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(2, 4, 6, 5)
    session = to_onnx(tcur.plain_copy(convolutions), path, x, dynamic_shapes=(PICTURES,))
    for shape in ((3, 4, 6, 5), (1, 4, 8, 9)):
        x = torch.randn(shape)
        assert_close(run(session, x), convolutions(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["identity"])
def test_onnxruntime_computes_other_transforms(transform: str, train: Callable[..., Any], tmp_path: Path) -> None:
    config = tcur.TCURConfig(rank=2, transform=transform, core_domain="slice")
    model = train(tcur.inject(First(vit()).eval(), config)).requires_grad_(False)
    session = to_onnx(tcur.plain_copy(model), tmp_path / "model.onnx")
    x = images(3)
    assert_close(run(session, x), model(x), rtol=1e-5, atol=1e-5)


def test_another_adapter_is_other_cores_in_the_same_file(
    model: nn.Module, train: Callable[..., Any], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    to_onnx(tcur.plain_copy(model), path, optimize=False)
    other = train(copy.deepcopy(model))
    file = onnx.load(path)
    cores = {name: p for name, p in other.named_parameters() if name.endswith(".core")}
    replaced = [tensor for tensor in file.graph.initializer if tensor.name in cores]
    assert {tensor.name for tensor in replaced} == set(cores)
    for tensor in replaced:
        tensor.CopyFrom(onnx.numpy_helper.from_array(cores[tensor.name].numpy(), tensor.name))
    onnx.save(file, path)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(3)
    assert_close(run(session, x), other(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other(x), model(x), atol=1e-2)
