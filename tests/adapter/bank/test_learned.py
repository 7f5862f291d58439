"""Banks over learned factors, and over orthonormal ones: outputs, training, files, memory, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import Net, cores_for, filled, one_by_one, with_cores

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FORMS: dict[str, dict[str, Any]] = {
    "own cores": {"stack_by": "none", "transform": "identity", "factors": "learned"},
    "coupled": {"factors": "learned"},
    "frequencies": {"factors": "learned", "frequencies": 2},
    "rows alone, riding": {"stack_by": "none", "transform": "identity", "factors": "learned_rows"},
}
forms = pytest.mark.parametrize("form", FORMS)


def inputs(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 3, 8, dtype=torch.float64, generator=generator)


def base() -> Net:
    torch.manual_seed(0)
    return Net().double()


def learned(form: str, seed: int = 0) -> tcur.Subspace:
    """The subspace of one task; another seed is another task."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(4, 3, 8, dtype=torch.float64, generator=generator)
    config = tcur.TCURConfig(rank=(3, 2), target_modules=r"blocks\..*", **FORMS[form])
    return tcur.learn_factors(base(), config, lambda model: (model(inputs(4)) - target).square().mean(), steps=5)


def saved(subspace: tcur.Subspace, path: Path, seed: int, **options: Any) -> Path:
    model = tcur.inject(base(), subspace=subspace)
    return tcur.save_adapter(with_cores(model, cores_for(model, seed)), path, **options)


@forms
def test_a_batch_computes_what_each_alone_does_and_trains(form: str) -> None:
    model = tcur.inject(base(), subspace=learned(form))
    bank = filled(model)
    x = inputs(4)
    assert_close(model(x, adapter_ids=["2", "0", -1, "1"]), one_by_one(model, [2, 0, -1, 1], x), **EXACT)
    parameters = bank.train(["0", "1"])
    model(x[:2], adapter_ids=["0", "1"]).square().sum().backward()
    alone = with_cores(model, cores_for(model, 1))
    alone(x[1:2]).square().sum().backward()
    for name, parameter in bank.parameters_of("1").items():
        assert_close(parameter.grad, tcur.stacks(alone)[name].core.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is not None for p in parameters)


@forms
def test_files_over_the_banks_subspace(form: str, tmp_path: Path) -> None:
    subspace = learned(form)
    model = tcur.inject(base(), subspace=subspace)
    bank = tcur.AdapterBank(model)
    bank.load(saved(subspace, tmp_path / "with.safetensors", 1))
    bank.load(saved(subspace, tmp_path / "without.safetensors", 2, include_subspace=False))
    x = inputs(2)
    assert_close(model(x, adapter_ids=["without", "with"]), one_by_one(model, [2, 1], x), **EXACT)
    many = bank.save(tmp_path / "many.safetensors")
    other_model = tcur.inject(base(), subspace=subspace)
    other = tcur.AdapterBank(other_model)
    assert other.load_all(many) == ["with", "without"]
    assert_close(other_model(x, adapter_ids=["without", "with"]), one_by_one(model, [2, 1], x), **EXACT)


@forms
def test_another_subspace_is_refused_by_its_digest(form: str, tmp_path: Path) -> None:
    here, there = learned(form), learned(form, 1)
    assert here.digest != there.digest
    model = tcur.inject(base(), subspace=here)
    bank = filled(model, 1)
    other = tcur.inject(base(), subspace=there)
    both = f"{there.digest}.*{here.digest}"
    with pytest.raises(ValueError, match=f"has subspace '{there.digest}', that of the bank's model '{here.digest}'"):
        bank.load(saved(there, tmp_path / "with.safetensors", 1))
    with pytest.raises(ValueError, match=f"over the subspace {there.digest[:12]}, found {here.digest[:12]}"):
        bank.load(saved(there, tmp_path / "without.safetensors", 1, include_subspace=False))
    with pytest.raises(ValueError, match=both):
        bank.load_all(filled(other, 2).save(tmp_path / "many.safetensors"))
    with pytest.raises(ValueError, match=both):
        bank.add("other", other)
    assert bank.names == ["0"]
    model(inputs(1), adapter_ids=["0"])
    tcur.load_adapter(model, tmp_path / "with.safetensors")
    with pytest.raises(ValueError, match="over another subspace than when the bank was made"):
        model(inputs(1), adapter_ids=["0"])


def test_learned_and_chosen_factors_do_not_mix(tmp_path: Path) -> None:
    subspace = learned("own cores")
    config = replace(subspace.config, factors="weights")
    chosen, over = tcur.inject(base(), config), tcur.inject(base(), subspace=subspace)
    with pytest.raises(ValueError, match="has factors 'learned', that of the bank's model 'weights'"):
        tcur.AdapterBank(chosen).load(saved(subspace, tmp_path / "a.safetensors", 1))
    with pytest.raises(ValueError, match="has factors 'weights', that of the bank's model 'learned'"):
        tcur.AdapterBank(over).load(tcur.save_adapter(chosen, tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="has factors 'weights', that of the bank's model 'learned'"):
        tcur.AdapterBank(over).load_all(filled(chosen).save(tmp_path / "many.safetensors"))


@pytest.mark.parametrize("transform", ["identity", "dft"])
def test_orthonormal_factors_and_others_do_not_mix(transform: str, tmp_path: Path) -> None:
    config = tcur.TCURConfig(rank=2, target_modules=r"blocks\..*", transform=transform, orthonormal=True)
    model, plain = tcur.inject(base(), config), tcur.inject(base(), replace(config, orthonormal=False))
    bank = filled(model)
    x = inputs(3)
    assert_close(model(x, adapter_ids=["2", "0", "1"]), one_by_one(model, [2, 0, 1], x), **EXACT)
    again = tcur.AdapterBank(tcur.inject(base(), config))
    assert again.load_all(bank.save(tmp_path / "many.safetensors")) == ["0", "1", "2"]
    own = tcur.save_adapter(with_cores(model, cores_for(model, 0)), tmp_path / "own.safetensors")
    path = tcur.save_adapter(with_cores(plain, cores_for(plain, 0)), tmp_path / "a.safetensors")
    again.load(own)
    message = "has orthonormal factors False, that of the bank's model True"
    for refused in (
        lambda: again.load(path),
        lambda: again.load_all(filled(plain).save(tmp_path / "plain.safetensors")),
        lambda: again.add("plain", plain),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    tcur.load_adapter(model, path)
    with pytest.raises(ValueError, match="has orthonormal=False, unlike when the bank was made"):
        model(x, adapter_ids=["2", "0", "1"])


def test_twenty_thousand_adapters_take_the_memory_of_their_cores() -> None:
    """576 parameters each, in nine layers of rank 8."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(9)))
    x, y = torch.randn(2, 4, 64, 16)
    config = tcur.TCURConfig.preset("learned", target_modules=r"\d")
    subspace = tcur.learn_factors(net, config, lambda model: (model(x) - y).square().mean(), steps=3)
    assert subspace.parameters == 576
    model = tcur.inject(copy.deepcopy(net), subspace=subspace)
    bank = tcur.AdapterBank(model)
    bank.add_all(dict.fromkeys(map(str, range(20_000))))
    assert len(bank) == 20_000
    assert bank.nbytes < 1.05 * 20_000 * 576 * 4
    bank.replace("19999", {name: torch.ones_like(core) for name, core in bank.cores("0").items()})
    rows = model(x[:2], adapter_ids=["0", "19999"])
    assert_close(rows[:1], net(x[:1]), rtol=1e-5, atol=1e-6)
    assert float((rows[1:] - net(x[1:2])).detach().norm()) > 0.1
