"""Adapter files over learned factors: with their subspace, or with its digest alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.tensors import read_tensors

Step = Callable[[nn.Module], Tensor]
LEARNED = tcur.TCURConfig.preset("learned", rank=2)


@pytest.fixture
def base(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network)


@pytest.mark.parametrize("inside", [True, False])
def test_a_file_gives_the_same_output(
    network: nn.Module, base: nn.Module, subspace: tcur.Subspace, train: Callable[..., Any], x: Tensor, tmp_path: Path,
    inside: bool,
) -> None:  # fmt: skip
    model = train(tcur.unfreeze(tcur.inject(network, subspace=subspace), "head"))
    with torch.no_grad():
        model.head.weight += 1
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_subspace=inside)
    loaded = tcur.load_adapter(base, path, None if inside else subspace)
    assert torch.equal(loaded(x), model(x))
    for name, stack in tcur.stacks(model).items():
        other = tcur.stacks(loaded)[name]
        assert torch.equal(other.core, stack.core)
        assert other.scale == stack.scale
        assert other.rides == stack.rides
        assert other.column_scores == stack.column_scores
    again = tcur.save_adapter(loaded, tmp_path / "again.safetensors", include_subspace=inside)
    assert again.read_bytes() == path.read_bytes()


def test_a_subspace_by_the_path_of_its_file(
    network: nn.Module, base: nn.Module, subspace: tcur.Subspace, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    family = subspace.save(tmp_path / "family.safetensors")
    model = train(tcur.inject(network, subspace=str(family)))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_subspace=False)
    assert torch.equal(tcur.load_adapter(base, path, family)(x), model(x))
    with pytest.raises(FileNotFoundError, match="nothing: no such file of a subspace"):
        tcur.load_adapter(base, path, "nothing")


def test_a_file_that_is_not_packed_as_earlier_ones_were_loads_too(
    network: nn.Module, base: nn.Module, subspace: tcur.Subspace, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    model = train(tcur.inject(network, subspace=subspace))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    metadata, tensors = read_tensors(path, "an adapter")
    apart = tmp_path / "apart.safetensors"
    save_file(tensors, apart, metadata)
    assert apart.stat().st_size > path.stat().st_size
    assert torch.equal(tcur.load_adapter(base, apart)(x), model(x))
    alone = subspace.save(tmp_path / "subspace.safetensors")
    metadata, tensors = read_tensors(alone, "a subspace")
    save_file(tensors, apart, metadata)
    assert tcur.Subspace.load(apart).digest == subspace.digest


def test_options_and_ranks_other_than_the_subspaces_travel(
    network: nn.Module, base: nn.Module, step: Step, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    config = replace(LEARNED, rank=1, rank_pattern={"linear1": (2, 1)}, alpha=2.0, dropout=0.5, scale=None)
    model = train(tcur.inject(network, config, subspace=subspace))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_subspace=False)
    loaded = tcur.load_adapter(base, path, subspace)
    assert torch.equal(loaded(x), model(x))
    assert {s.rank for s in tcur.stacks(loaded).values()} == {(1, 1), (2, 1)}
    assert {s.options.dropout for s in tcur.stacks(loaded).values()} == {0.5}


def test_trained_factors_are_in_the_file(
    network: nn.Module, base: nn.Module, step: Step, x: Tensor, tmp_path: Path
) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    model = tcur.inject(network, replace(LEARNED, trainable="all"), subspace=subspace)
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            for parameter in (stack.core, stack.col, stack.row):
                parameter += 0.1 * torch.randn_like(parameter)
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    assert torch.equal(tcur.load_adapter(base, path)(x), model(x))


def test_a_model_over_the_same_subspace_loads_cores_alone(
    network: nn.Module, base: nn.Module, step: Step, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    subspace = tcur.learn_factors(network, LEARNED, step, 4)
    model = train(tcur.inject(network, subspace=subspace))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_subspace=False)
    other = tcur.inject(base, subspace=subspace)
    assert torch.equal(tcur.load_adapter(other, path)(x), model(x))


def test_a_missing_or_another_subspace_is_named(
    network: nn.Module, base: nn.Module, step: Step, tmp_path: Path, state_of: Callable[[nn.Module], object],
    assert_unchanged: Callable[[nn.Module, object], None],
) -> None:  # fmt: skip
    subspace, other = (tcur.learn_factors(network, LEARNED, step, steps) for steps in (4, 5))
    model = tcur.inject(network, subspace=subspace)
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_subspace=False)
    before = state_of(base)
    with pytest.raises(ValueError, match=f"cores over the subspace {subspace.digest[:12]}, which is not in the file"):
        tcur.load_adapter(base, path)
    with pytest.raises(ValueError, match=f"subspace {subspace.digest[:12]}, found {other.digest[:12]}"):
        tcur.load_adapter(base, path, other)
    assert_unchanged(base, before)
    with pytest.raises(ValueError, match="names its subspace by digest alone"):
        tcur.Subspace.load(path)
    whole = tcur.save_adapter(model, tmp_path / "whole.safetensors")
    assert tcur.Subspace.load(whole).digest == subspace.digest


def test_a_file_for_other_base_weights_is_refused(
    network: nn.Module, make_network: Callable[..., nn.Module], step: Step, tmp_path: Path
) -> None:
    model = tcur.inject(network, subspace=tcur.learn_factors(network, LEARNED, step, 4))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_factors=True)
    with pytest.raises(ValueError, match="learned on other base weights"):
        tcur.load_adapter(make_network(), path)


def test_merged_equals_unmerged(
    network: nn.Module, subspace: tcur.Subspace, train: Callable[..., Any], x: Tensor
) -> None:
    model = train(tcur.inject(network, subspace=subspace))
    before = model(x)
    torch.testing.assert_close(tcur.merge(model)(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tcur.unmerge(model)(x), before, rtol=1e-4, atol=1e-5)


def test_base_weights_that_change_under_learned_factors_are_named(
    network: nn.Module, make_network: Callable[..., nn.Module], step: Step
) -> None:
    model = tcur.inject(network, subspace=tcur.learn_factors(network, LEARNED, step, 4))
    factors = {name: stack.C.clone() for name, stack in tcur.stacks(model).items()}
    with pytest.warns(UserWarning, match="changed under learned factors"):
        model.load_state_dict(make_network().state_dict(), strict=False)
    assert all(torch.equal(stack.C, factors[name]) for name, stack in tcur.stacks(model).items())


def test_cores_alone_are_small(make_network: Callable[..., nn.Module], tmp_path: Path) -> None:
    """36 layers of rank 4, as a network for images has them: 576 parameters, and little more than their bytes."""
    model = make_network(width=16, depth=6)
    x = torch.randn(2, 5, 6)
    subspace = tcur.learn_factors(model, tcur.TCURConfig.preset("learned", rank=4), lambda m: m(x).square().sum(), 2)
    assert subspace.parameters == 576
    path = tcur.save_adapter(tcur.inject(model, subspace=subspace), tmp_path / "a.safetensors", include_subspace=False)
    assert path.stat().st_size < 576 * 4 + 36 * 8 + 700
