"""transformers' Trainer on small adapted models, by ``tcur.inject`` and through PEFT."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from .entries import ENTRIES, Entry
from .small_models import MODELS, adapted, base, cores, examples, loss, output, train, trainer

Trained = Callable[[str, Entry], nn.Module]


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENTRIES)
def entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A copy of a trained model; every kind and entry is trained once."""
    models: dict[tuple[str, int], nn.Module] = {}

    def trained(kind: str, entry: Entry) -> nn.Module:
        key = kind, id(entry)
        if key not in models:
            models[key] = train(adapted(kind, entry), kind, tmp_path_factory.mktemp("runs"))
        return copy.deepcopy(models[key])

    return trained


@pytest.fixture
def reloaded(trained: Trained, tmp_path: Path) -> Trained:
    """A trained model after saving its adapter and loading it onto its base."""

    def reloaded(kind: str, entry: Entry) -> nn.Module:
        entry.save(trained(kind, entry), tmp_path)
        return entry.load(base(kind), tmp_path)

    return reloaded


# Checkpointing and autocast are the model's and PyTorch's own, whatever the entry: each model once, one model by both.
ONCE = [(kind, name) for kind, name in zip(MODELS, itertools.cycle(ENTRIES))]
ONCE.append((ONCE[0][0], next(name for name in ENTRIES if name != ONCE[0][1])))
once = pytest.mark.parametrize(("kind", "entry"), ONCE, indirect=True)

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def assert_same_cores(entry: Entry, found: nn.Module, expected: nn.Module) -> None:
    """The cores are equal bit for bit."""
    for name, core in cores(entry, expected).items():
        assert torch.equal(cores(entry, found)[name], core), name


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_loss_falls_and_only_the_cores_change(kind: str, entry: Entry, trained: Trained) -> None:
    model = trained(kind, entry)
    assert loss(model, kind) < 0.9 * loss(base(kind), kind)
    assert all(bool(core.any()) for core in cores(entry, model).values())
    after = entry.unload(model).state_dict()
    before = base(kind).state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_both_entries_train_the_same_cores(kind: str, trained: Trained) -> None:
    inject, peft = (cores(entry, trained(kind, entry)) for entry in ENTRIES.values())
    assert inject.keys() == peft.keys()
    for name, core in inject.items():
        assert distance(peft[name], core) < 1e-4, name


@once
def test_gradient_checkpointing_trains_the_same_cores(
    kind: str, entry: Entry, trained: Trained, tmp_path: Path
) -> None:
    again = train(adapted(kind, entry), kind, tmp_path, **CHECKPOINTING)
    for name, core in cores(entry, trained(kind, entry)).items():
        assert_close(cores(entry, again)[name], core, rtol=1e-4, atol=1e-6, msg=name)


@once
def test_bf16_trains_float32_cores(kind: str, entry: Entry, tmp_path: Path) -> None:
    model = train(adapted(kind, entry), kind, tmp_path, bf16=True, **CHECKPOINTING)
    assert loss(model, kind) < 0.9 * loss(base(kind), kind)
    assert {core.dtype for core in cores(entry, model).values()} == {torch.float32}


def test_torch_compile_trains_the_same_cores(entry: Entry, tmp_path: Path) -> None:
    def shallow() -> nn.Module:
        model = base("Llama")
        del model.model.layers[1:]  # fewer kernels for Inductor to compile
        return entry.adapt(model, rank=4)

    plain, compiled = (train(shallow(), "Llama", tmp_path, max_steps=2, torch_compile=c) for c in (False, True))
    for name, core in cores(entry, plain).items():
        assert_close(cores(entry, compiled)[name], core, rtol=1e-3, atol=1e-4, msg=name)


EVERY_OTHER_STEP = {"save_strategy": "steps", "save_steps": 2}


def test_the_trainers_checkpoint_goes_on_where_it_stopped(entry: Entry, tmp_path: Path) -> None:
    whole = train(adapted("GPT-2", entry), "GPT-2", tmp_path / "whole", max_steps=4)
    parts = tmp_path / "parts"
    train(adapted("GPT-2", entry), "GPT-2", parts, max_steps=2, **EVERY_OTHER_STEP)
    resumed = train(adapted("GPT-2", entry), "GPT-2", parts, resume=True, max_steps=4, **EVERY_OTHER_STEP)
    assert_same_cores(entry, resumed, whole)


def test_through_peft_the_trainers_checkpoint_is_the_adapter_alone(tmp_path: Path) -> None:
    train(adapted("GPT-2", ENTRIES["peft"]), "GPT-2", tmp_path, max_steps=2, **EVERY_OTHER_STEP)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.tcurlora_") for name in saved)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_the_best_model_is_loaded_at_the_end(entry: Entry, tmp_path: Path) -> None:
    """The metric is such that the first checkpoint is the best one, not the last."""
    best = {
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
        "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    model = train(adapted("Llama", entry), "Llama", tmp_path / "best", max_steps=4, **EVERY_OTHER_STEP, **best)
    assert_same_cores(entry, model, train(adapted("Llama", entry), "Llama", tmp_path / "first", max_steps=2))


def test_what_save_model_saves_computes_the_same(entry: Entry, trained: Trained, tmp_path: Path) -> None:
    """With inject it saves the whole state_dict, with PEFT the adapter."""
    model = trained("BERT", entry)
    trainer(model, "BERT", tmp_path).save_model()
    if entry is ENTRIES["peft"]:
        loaded = entry.load(base("BERT"), tmp_path)
    else:
        loaded = adapted("BERT", entry)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(output(loaded, "BERT"), output(model, "BERT"))


def test_a_head_that_trains_is_saved_with_the_adapter(entry: Entry, tmp_path: Path) -> None:
    model = train(adapted("BERT", entry, head="classifier"), "BERT", tmp_path, max_steps=3)
    heads = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("weight")]
    assert len(heads) == 1
    assert not torch.equal(heads[0], base("BERT").classifier.weight)
    entry.save(model, tmp_path)
    assert torch.equal(output(entry.load(base("BERT"), tmp_path), "BERT"), output(model, "BERT"))


def test_trained_loaded_and_merged_agree(kind: str, entry: Entry, trained: Trained, reloaded: Trained) -> None:
    """docs/transformers.md states these tolerances."""
    found = output(trained(kind, entry), kind)
    loaded = reloaded(kind, entry)
    assert torch.equal(output(loaded, kind), found)
    assert distance(output(base(kind), kind), found) > 0.01
    merged = entry.merge(loaded)
    assert type(merged) is type(base(kind))
    assert distance(output(merged, kind), found) < 1e-5


def test_a_new_process_that_loads_an_adapter_computes_the_same_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    """tcur.load_adapter and PeftModel.from_pretrained; AutoPeftModel is in peft/test_saving.py."""
    expected = {}
    for kind in MODELS:
        for name, entry in ENTRIES.items():
            folder, model = tmp_path / f"{kind}, {name}", trained(kind, entry)
            folder.mkdir()
            entry.save(model, folder)
            expected[folder] = output(model, kind)
    roots = [str(Path(__file__).parents[1]), str(Path(tcur.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    command = [sys.executable, "-m", "integrations.elsewhere", str(tmp_path)]
    path = os.pathsep.join(filter(None, roots))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(expected) == 10
    for folder, right in expected.items():
        assert torch.equal(torch.load(folder / "output.pt"), right), folder.name


@pytest.mark.filterwarnings("ignore:rounding to bfloat16")
def test_merged_in_bfloat16_agrees_as_far_as_bfloat16_goes(kind: str, entry: Entry, trained: Trained) -> None:
    model = trained(kind, entry).bfloat16()
    found = output(model, kind, torch.bfloat16)
    assert distance(output(entry.merge(model), kind, torch.bfloat16), found) < 0.05


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_generation_is_the_same_trained_loaded_and_merged(
    kind: str, entry: Entry, trained: Trained, reloaded: Trained
) -> None:
    model, loaded = trained(kind, entry), reloaded(kind, entry)
    merged = entry.merge(copy.deepcopy(loaded))
    prompt = torch.stack([one["input_ids"][:3] for one in examples(kind)[:2]])

    def generate(from_: Any, **options: Any) -> Tensor:
        fixed = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        return from_.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **fixed, **options)

    written = generate(model)
    assert written.shape == (2, 9)
    assert torch.equal(generate(model, use_cache=False), written)
    assert torch.equal(generate(loaded), written)
    assert torch.equal(generate(merged), written)
    assert torch.equal(generate(merged, use_cache=False), written)
    assert not torch.equal(generate(base(kind)), written)
