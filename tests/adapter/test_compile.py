"""Whole adapted models under torch.compile and autocast: one graph for all batches, the same results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import tcurlora_ext as tcur

Make = Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]


def vit() -> tuple[nn.Module, Callable[[int], Tensor]]:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ViT(1, (8, 8, 8), (4, 4, 4), hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2)
    return model, lambda batch: torch.randn(batch, 1, 8, 8, 8)


def llama() -> tuple[nn.Module, Callable[[int], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), lambda batch: torch.randint(40, (batch, 7))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=[vit, llama], ids=lambda make: make.__name__)
def job(request: pytest.FixtureRequest, train: Callable[..., Any]) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """An adapted model, and a function from a batch size to its inputs."""
    model, inputs = request.param()
    return train(tcur.inject(model.eval(), tcur.TCURConfig(rank=2))), inputs


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    result = model(inputs)
    return result[0] if isinstance(result, tuple) else result.logits


def cores(model: nn.Module) -> list[nn.Parameter]:
    return [stack.core for stack in tcur.stacks(model).values()]


def test_training_is_one_graph_for_all_batches(job: Any) -> None:
    model, inputs = job
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend=counter)
    model.train()
    for batch in (2, 2, 3, 4, 5):
        x, results = inputs(batch), []
        for m in (model, compiled):
            y = output(m, x)
            results.append([y, *torch.autograd.grad(y.square().sum(), cores(m))])
        for found, right in zip(*reversed(results), strict=True):
            assert_close(found, right, rtol=1e-3, atol=1e-4)
    # One for the first batch, one for any other.
    assert counter.frame_count == 2


def test_inference_is_one_graph(job: Any) -> None:
    model, inputs = job
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    with torch.inference_mode():
        for batch in (2, 3, 4):
            x = inputs(batch)
            assert_close(output(compiled, x), output(model, x), rtol=1e-4, atol=1e-4)
            graphs.append(counter.frame_count)
    # A plain model's first call counts two as well.
    assert graphs[0] == graphs[-1]


def test_merging_a_compiled_model_is_noticed(job: Any) -> None:
    model, inputs = job
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), inputs(2)
    with torch.no_grad():
        y, base = output(compiled, x), output(tcur.remove(copy.deepcopy(model)), x)
        tcur.merge(model)
        assert_close(output(compiled, x), y, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(y, base, rtol=1e-2, atol=1e-2)
        tcur.unmerge(model)
        for core in cores(model):
            core.zero_()
        assert_close(output(compiled, x), base, rtol=1e-4, atol=1e-4)


def test_checkpointed_blocks_compile_to_the_same_gradients(adapted: Any, x: Tensor) -> None:
    def step(h: Tensor, checkpointed: bool) -> Tensor:
        for block in adapted.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
        return h.square().sum()

    h = adapted.embed(x).detach()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(h, True), cores(adapted))
    for a, b in zip(found, torch.autograd.grad(step(h, False), cores(adapted)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_a_model(adapted: Any, x: Tensor) -> None:
    compiled = torch.compile(copy.deepcopy(adapted), fullgraph=True)
    results = []
    for model in (adapted, compiled):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), cores(model))])
    for found, right in zip(*reversed(results), strict=True):
        assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_loses_no_more_than_in_the_plain_model(job: Any, compiled: bool) -> None:
    """Dtype and error against float32 are compared with those of the merged model, whose layers are nn.Linear."""
    model, inputs = job
    plain, x = tcur.plain_copy(model, merged=True), inputs(8)
    with torch.no_grad():
        right = output(model, x)
        if compiled:
            model = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = output(model, x), output(plain, x)
    assert found.dtype == expected.dtype
    error, usual = (float((y - right).norm() / right.norm()) for y in (found, expected))
    # h and m are rounded too, which a merged weight spares; bfloat16 has 8 bits.
    assert 0 < error < 2 * usual + 2**-8


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradients_of_autocast_are_those_of_float32_to_its_precision(job: Any, compiled: bool) -> None:
    model, inputs = job
    x = inputs(8)
    right = torch.autograd.grad(output(model, x).square().sum(), cores(model))
    runs = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(runs, x).float().square().sum()
    found = torch.autograd.grad(loss, cores(model))
    for a, b in zip(found, right, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 0.1 * float(b.norm())
