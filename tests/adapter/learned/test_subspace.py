"""A subspace: its factors, its file, and the models that it does not fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.maths.coding import BITS

Step = Callable[[nn.Module], Tensor]
LEARNED = tcur.TCURConfig.preset("learned", rank=2)

SCRIPT = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
import tcurlora_ext as tcur
found = hashlib.sha256()
subspace = tcur.Subspace.load(sys.argv[2])
for stack in subspace.stacks.values():
    weights = torch.ones(len(stack.names), *stack.shape)
    for factor in subspace.factors(stack.names, stack.rank, weights, subspace.config, exact=False):
        found.update(factor.contiguous().numpy().data)
print(found.hexdigest())
"""


def test_factors_are_orthonormal_at_every_frequency(network: nn.Module, subspace: tcur.Subspace) -> None:
    model = tcur.inject(network, subspace=subspace)
    for stack in tcur.stacks(model).values():
        along, kept = stack.options.along, stack.options.frequencies
        learned = [stack.R.mT] if stack.options.factors == "learned_rows" else [stack.C, stack.R.mT]
        for factor in learned:
            parts = along.spectrum(factor.double())[0][:kept]
            unit = torch.eye(2, dtype=parts.dtype).expand(len(parts), -1, -1)
            torch.testing.assert_close(parts.mH @ parts, unit, rtol=0, atol=1e-5)


def test_a_zero_core_leaves_the_output_and_training_lowers_the_loss(
    network: nn.Module, subspace: tcur.Subspace, step: Step, x: Tensor
) -> None:
    plain = network(x)
    before = float(step(network).detach())
    tcur.inject(network, subspace=subspace)
    torch.testing.assert_close(network(x), plain)
    cores = [stack.core for stack in tcur.stacks(network).values()]
    assert sum(core.numel() for core in cores) == subspace.parameters
    optimizer = torch.optim.Adam(cores, lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        step(network).backward()
        optimizer.step()
    assert float(step(network).detach()) < before - 0.005


def test_the_gradient_is_that_of_the_dense_definition(
    network: nn.Module, subspace: tcur.Subspace, step: Step, train: Callable[[nn.Module], nn.Module]
) -> None:
    model = train(tcur.inject(network, subspace=subspace)).double()
    dense = tcur.remove(copy.deepcopy(model))
    named = {f"{name}.weight": layer for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)}
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model(x).square().sum().backward()

    def loss_of(core: Tensor, own: tcur.TCURStack) -> Tensor:
        weights = {}
        for stack in tcur.stacks(model).values():
            change = own_delta(stack, core if stack is own else stack.core.detach())
            parts: dict[str, list[Tensor]] = {}
            for name, part in zip(stack.names, change, strict=True):
                parts.setdefault(name.partition("[")[0], []).append(part)
            for name, slices in parts.items():
                weights[f"{name}.weight"] = base[f"{name}.weight"] + torch.cat(slices)
        return torch.func.functional_call(dense, weights, (x,)).square().sum()

    def own_delta(stack: tcur.TCURStack, core: Tensor) -> Tensor:
        along = stack.options.along
        U = along.unfold(core, stack.slices)
        return stack.scale * along.product(along.product(stack.C, U), stack.R)

    base = {name: model.get_submodule(name.removesuffix(".weight")).weight.detach() for name in named}
    for stack in tcur.stacks(model).values():
        core = stack.core.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(core, stack), core)
        assert stack.core.grad is not None
        torch.testing.assert_close(stack.core.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, (1, 2), (2, 1)])
def test_a_lower_rank_takes_the_leading_directions(network: nn.Module, step: Step, rank: int) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    whole = tcur.stacks(tcur.inject(copy.deepcopy(network), subspace=subspace))
    part = tcur.stacks(tcur.inject(network, replace(LEARNED, rank=rank), subspace=subspace))
    for name, stack in part.items():
        c, r = stack.rank
        assert torch.equal(stack.C, whole[name].C[..., :c])
        assert torch.equal(stack.R, whole[name].R[:, :r])


@pytest.mark.parametrize("bits", BITS)
def test_bits(network: nn.Module, step: Step, bits: int, tmp_path: Path) -> None:
    subspace = tcur.learn_factors(network, tcur.TCURConfig(rank=2, factors="learned"), step, 4, bits=bits)
    entries = sum(2 * len(s.names) * sum(s.shape) for s in subspace.stacks.values())
    assert sum(t.numel() for t in subspace.tensors().values()) <= entries * bits / 8 + 6
    loaded = tcur.Subspace.load(subspace.save(tmp_path / "new" / "family.safetensors"))
    assert loaded.digest == subspace.digest
    assert loaded.config == subspace.config
    assert loaded.about == subspace.about
    one, other = (tcur.stacks(tcur.inject(copy.deepcopy(network), subspace=s)) for s in (subspace, loaded))
    assert all(torch.equal(one[name].col, other[name].col) for name in one)


def test_more_bits_are_nearer_to_the_directions(network: nn.Module, step: Step) -> None:
    factors = {
        bits: next(iter(tcur.stacks(
            tcur.inject(copy.deepcopy(network), subspace=tcur.learn_factors(network, LEARNED, step, 4, bits=bits))
        ).values())).C
        for bits in BITS
    }  # fmt: skip
    off = [float((factors[bits] - factors[32]).norm()) for bits in BITS]
    assert off == sorted(off, reverse=True)
    assert off[-2] < 1e-3


def test_another_process_with_other_threads_decodes_the_same_bits(
    network: nn.Module, step: Step, tmp_path: Path
) -> None:
    subspace = tcur.learn_factors(network, tcur.TCURConfig(rank=2, factors="learned"), step, 4)
    path = subspace.save(tmp_path / "family.safetensors")
    results = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, threads, str(path)], check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(results) == 1


def test_a_subspace_of_another_base_or_of_other_layers_is_refused(
    network: nn.Module,
    step: Step,
    make_network: Callable[..., nn.Module],
    state_of: Callable[[nn.Module], object],
    assert_unchanged: Callable[[nn.Module, object], None],
) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    other = make_network()
    before = state_of(other)
    for model, config, message in [
        (other, None, "learned on other base weights: 3 of 3 slices differ, first blocks.0.attn.qkv"),
        (make_network(depth=3), None, "has no directions for blocks.2.attn.qkv|other base weights"),
        (network, tcur.TCURConfig(rank=2, factors="learned"), "transform is 'dft', expected 'identity'"),
        (network, replace(LEARNED, rank=3), r"rank \(c, r\) is \(3, 3\), expected at most the \(2, 2\)"),
        (network, tcur.TCURConfig(rank=2), "a subspace is given and factors is 'weights'"),
        (network, replace(LEARNED, split_fused={}), r"no directions for blocks.0.attn.qkv \(1 slices\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            tcur.inject(model, config, subspace=subspace)
    assert_unchanged(other, before)
    with pytest.raises(ValueError, match="factors is 'learned', expected a subspace: see learn_factors"):
        tcur.inject(network, LEARNED)


def test_a_base_in_another_dtype_is_accepted(network: nn.Module, step: Step) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    model = tcur.inject(network.to(torch.bfloat16), subspace=subspace)
    assert all(stack.row.dtype == torch.bfloat16 for stack in tcur.stacks(model).values())


def test_damaged_files_are_refused(network: nn.Module, step: Step, tmp_path: Path) -> None:
    path = tcur.learn_factors(network, LEARNED, step, 4).save(tmp_path / "family.safetensors")
    whole = path.read_bytes()
    metadata, tensors = read_tensors(path, "a subspace")
    header = json.loads(metadata["tcurlora_subspace"])
    first = next(iter(tensors))
    for change, message in [
        ({}, "no subspace"),
        ({"tcurlora_subspace": json.dumps(header | {"format": 9})}, "format 9 of a subspace, expected 1"),
        ({"tcurlora_subspace": json.dumps(header | {"bits": 5})}, "bits is 5"),
        ({"tcurlora_subspace": json.dumps(header | {"about": {"steps": 9}})}, "another digest"),
        ({"tcurlora_subspace": json.dumps({"digest": "", "format": 1})}, "description is damaged"),
        ({"tcurlora_subspace": "["}, "description is damaged"),
    ]:
        safetensors.torch.save_file(tensors, path, change)
        with pytest.raises(ValueError, match=message):
            tcur.Subspace.load(path)
    for broken, message in [
        ({**tensors, first: tensors[first] ^ 1}, "another digest"),
        ({**tensors, first: tensors[first][:-1]}, "another digest"),
        ({name: t for name, t in tensors.items() if name != first}, "damaged"),
    ]:
        safetensors.torch.save_file(broken, path, metadata)
        with pytest.raises(ValueError, match=message):
            tcur.Subspace.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        tcur.Subspace.load(path)
    with pytest.raises(FileNotFoundError, match="no such file of a subspace"):
        tcur.Subspace.load(tmp_path / "nothing")
