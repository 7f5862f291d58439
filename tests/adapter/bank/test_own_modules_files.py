"""Files of banks and of adapters with heads and norms of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import cores_for
from .with_heads import MODULES, each, filled, inputs, make, own_for, plain, saved, trained

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("pool", [None, "cpu"])
def test_a_file_of_many_adapters_holds_their_heads(pool: str | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if pool is None else {"pool": pool, "capacity": 2}
    path = filled(make(), 5, **options).save(tmp_path / "many.safetensors")
    model, x = make(), inputs(2)
    bank = tcur.AdapterBank(model, modules=MODULES, **options)
    assert bank.load_all(path) == ["0", "1", "2", "3", "4"]
    for order in ([4, 0], [2, -1], [1, 3]):
        y = model(x, adapter_ids=[-1 if at < 0 else str(at) for at in order])
        assert_close(y, each(order, x), **EXACT)
    bank.load(saved(tmp_path, 9))
    assert_close(model(x, adapter_ids=["9", "4"]), each([9, 4], x), **EXACT)
    for modules, message in (((), r"head\.bias, head\.weight, norm\.bias"), (["head"], r"norm\.bias, norm\.weight")):
        with pytest.raises(ValueError, match=rf"has {message}.*modules=\[.*'norm'\]\) keeps them"):
            tcur.AdapterBank(make(), modules=modules).load_all(path)


def test_files_without_heads_are_as_before_and_get_the_bases(tmp_path: Path) -> None:
    model, x = make(), inputs(2)
    without = tcur.AdapterBank(make())
    without.add("a", cores_for(model, 1))
    formats = {}
    for name, bank in {"without": without, "with": filled(make(), 1)}.items():
        with safe_open(bank.save(tmp_path / f"{name}.safetensors"), "pt") as file:
            formats[name] = json.loads(file.metadata()["tcurlora_bank"])["format"]
            assert ("beside.head.weight" in file.keys()) == (name == "with")  # noqa: SIM118
    assert formats == {"without": 1, "with": 2}  # earlier versions refuse what they would leave out
    bank = tcur.AdapterBank(model, modules=MODULES)
    bank.load_all(tmp_path / "without.safetensors")
    assert_close(model(x, adapter_ids=["a", -1])[:1], trained(1, own=False)(x)[:1], **EXACT)


def test_files_over_learned_factors(tmp_path: Path) -> None:
    config = tcur.TCURConfig(rank=(3, 2), target_modules=r"net\..*", factors="learned")
    subspace = tcur.learn_factors(plain(), config, lambda model: model(inputs(4)).square().mean(), steps=3)

    def adapted(seed: int | None) -> nn.Module:
        model = tcur.inject(plain(), subspace=subspace)
        if seed is not None:
            tcur.unfreeze(model, MODULES)
            for name, value in own_for(seed).items():
                model.get_parameter(name).data.copy_(value)
            for name, core in cores_for(model, seed).items():
                tcur.stacks(model)[name].core.data.copy_(core)
        return model

    bank = tcur.AdapterBank(model := adapted(None), modules=MODULES)
    bank.load(tcur.save_adapter(adapted(1), tmp_path / "1.safetensors", include_subspace=False))
    bank.add("2", adapted(2))
    other = tcur.AdapterBank(model, modules=MODULES)
    assert other.load_all(bank.save(tmp_path / "many.safetensors")) == ["1", "2"]
    x = inputs(3)
    for each_bank in (bank, other):
        with each_bank.use(["2", -1, "1"]):
            y = model(x)
        for row, seed in enumerate([2, None, 1]):
            assert_close(y[row], adapted(seed)(x)[row], **EXACT)
