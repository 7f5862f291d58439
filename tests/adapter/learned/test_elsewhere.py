"""Adapters over learned factors in what is made of an adapted model: LoRA, copies, exports, compiled, recomputed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tcurlora_ext as tcur

Model = nn.Module


@pytest.fixture
def model(network: nn.Module, subspace: tcur.Subspace, train: Callable[..., Any]) -> Model:
    """The adapted network, with cores that change its output."""
    return train(tcur.inject(copy.deepcopy(network), subspace=subspace))


def test_as_a_lora_adapter_of_peft(model: Model, network: nn.Module, x: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tcur.to_lora(model.double(), tmp_path)
    x = x.double()
    loaded = peft.PeftModel.from_pretrained(network.double(), folder).eval()
    assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
    config = next(iter(tcur.stacks(model).values())).options
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    if config.transform == "identity":
        assert rank == 3 * 2  # own cores: their rank, three times in the fused projection
        tensors = load_file(folder / "adapter_model.safetensors")
        found = {name: int(torch.linalg.matrix_rank(t)) for name, t in tensors.items() if ".lora_A." in name}
        assert all(rank == (6 if "qkv" in name else 2) for name, rank in found.items())


@pytest.mark.parametrize("merged", [False, True])
def test_plain_copies_and_exports(model: Model, x: Tensor, merged: bool) -> None:
    plain = tcur.plain_copy(model.double(), merged)
    x = x.double()
    assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    program = torch.export.export(plain.requires_grad_(False), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not any("tcurlora" in str(node.target) for node in program.graph.nodes)
    for batch in (2, 3):
        some = torch.randn(batch, 5, 6, dtype=torch.float64)
        assert_close(program.module()(some), model(some), rtol=1e-10, atol=1e-10)


def test_exported_with_the_operator(model: Model, x: Tensor) -> None:
    program = torch.export.export(model.requires_grad_(False), (x,))
    assert any("tcurlora" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("form", ["own cores", "rows alone, coupled"], indirect=True)
def test_onnxruntime_computes_the_same(model: Model, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    plain = tcur.plain_copy(model).requires_grad_(False)
    torch.onnx.export(plain, (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), external_data=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for some in (x, torch.randn(3, 5, 6)):
        (y,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
        assert_close(torch.from_numpy(y), model(some), rtol=1e-5, atol=1e-5)


def gradients(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    cores = [stack.core for stack in tcur.stacks(model).values()]
    return list(torch.autograd.grad(forward(x).square().sum(), cores))


def test_compiled_in_one_graph(model: Model, x: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), model(x))
    assert_close(gradients(model, x, compiled), gradients(model, x, model), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward_pass(model: Model, x: Tensor, reentrant: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        x = model.embed(x).requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(model.norm(x.transpose(1, 2)).transpose(1, 2))

    cores = [stack.core for stack in tcur.stacks(model).values()]
    found = []
    for call in (forward, model):
        call(x).square().sum().backward()
        found.append([core.grad.clone() for core in cores])
        for core in cores:
            core.grad = None
    assert_close(*found, rtol=1e-5, atol=1e-5)  # reentrant passes add the gradients of a shared core in another order


def test_the_gradient_is_that_of_the_dense_change(model: Model, x: Tensor) -> None:
    """The core's gradient by the operator is that through W + dW, formed with autograd."""
    model, x = model.double(), x.double()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, tcur.TCURLinear)}
    weights = {f"{name}.weight": layer.weight + layer.delta_weight() for name, layer in layers.items()}
    plain = tcur.remove(copy.deepcopy(model))
    through = gradients(model, x, lambda x: torch.func.functional_call(plain, weights, (x,)))
    assert_close(gradients(model, x, model), through, rtol=1e-9, atol=1e-11)


def test_summary_counts_the_cores(model: Model, subspace: tcur.Subspace) -> None:
    found = tcur.summary(model)
    assert found.trained == subspace.parameters == sum(s.core.numel() for s in tcur.stacks(model).values())
    assert f"subspace {subspace.digest[:12]}, in 2 bits, " in str(found)
