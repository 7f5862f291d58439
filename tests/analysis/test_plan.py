"""The plan's parameters and file sizes against what is written, memory of a warm-up, text, and wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.analysis.plan import Plan, plan, trace_calls
from tcurlora_ext.io.table import text_table

from .small import NAMES, TOKENS, Block, SiblingBlock, build, leaf, learned, meta


def test_lora_file_is_about_what_peft_writes(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    expected = plan(meta(), tcur.TCURConfig(rank=2), TOKENS, lora_rank=4).lora
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=NAMES))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert expected.file == pytest.approx(size, rel=0.05)


def test_traced_calls_say_the_same_as_a_number_of_tokens() -> None:
    config = tcur.TCURConfig(rank=2)
    for block in (Block, SiblingBlock):
        model = meta(block)
        calls = trace_calls(model, config, torch.empty(5, 7, 32, device="meta"))
        assert plan(model, config, calls).rows() == plan(model, config, TOKENS).rows()
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_not_called_is_named() -> None:
    model = build()
    model[0].extra = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(32, 32)})})
    config = tcur.TCURConfig(rank=2)
    with pytest.raises(ValueError, match=r"0\.extra\.attn\.q_proj is a target, but the traced forward pass"):
        plan(model, config, trace_calls(model, config, leaf()))


@pytest.mark.parametrize("options", [{}, {"trainable": "all"}, {"rank": (3, 2), "stack_by": "none"}])
def test_trained_parameters_factors_and_file_are_those_of_the_adapter(options: dict[str, Any], tmp_path: Any) -> None:
    config = tcur.TCURConfig(**{"rank": 2} | options)
    expected = plan(meta(depth=8), config, TOKENS)
    model = tcur.inject(build(depth=8), config)
    summary = tcur.summary(model)
    assert expected.tcur.trained == summary.trained
    assert [(s.name, s.slices, s.q) for s in expected.stacks] == [(s.name, s.slices, s.q) for s in summary.stacks]
    factors = sum(b.nbytes for n, b in model.named_buffers() if n.endswith((".col", ".row")))
    assert expected.tcur.factors == factors
    for stack in tcur.stacks(model).values():
        nn.init.normal_(stack.core)
    size = tcur.save_adapter(model, tmp_path / "adapter.safetensors").stat().st_size
    assert expected.tcur.file == pytest.approx(size, rel=0.03)


def test_the_papers_setting() -> None:
    """UNETR ViT-B, arXiv 2501.02227: 72 r^2 trained parameters in three stacks."""
    networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
    pytest.importorskip("monai")
    with torch.device("meta"):
        model = networks.build_network(networks.NetworkConfig("unetr", 1, 2, (96, 96, 96)))
    found = plan(model, tcur.TCURConfig(rank=8), tokens=216)
    assert {s.shape: s.slices for s in found.stacks} == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    assert found.tcur.trained == 4608
    assert {s.shape: s.q for s in found.stacks} == {(768, 768): 384, (3072, 768): 96, (768, 3072): 96}
    assert {s.crossover for s in found.stacks if s.slices == 48} == {384}


def test_totals_are_the_sums_of_the_stacks() -> None:
    found = plan(meta(), tcur.TCURConfig(rank=2), TOKENS)
    for kind in ("base", "tcur", "lora"):
        whole = getattr(found, kind)
        for name in ("trained", "forward", "backward", "saved", "factors"):
            assert getattr(whole, name) == sum(getattr(getattr(s, kind), name) for s in found.stacks)
    common = found.tcur.file - sum(s.tcur.file for s in found.stacks)
    assert 0 < common < 1500  # the configuration stands in the file once


def test_the_dtype_halves_what_is_saved_but_not_the_core() -> None:
    config = tcur.TCURConfig(rank=2)
    wide, narrow = (plan(meta(), config, TOKENS, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert (narrow.tcur.saved, narrow.lora.saved) == (wide.tcur.saved // 2, wide.lora.saved // 2)
    assert (narrow.tcur.trained, narrow.dtype) == (wide.tcur.trained, "bfloat16")


def test_the_short_table_has_whole_names_in_80_columns() -> None:
    towers = {
        name: nn.ModuleList([nn.Linear(8, 8) for _ in "12"]) for name in ("a_tower_of_the_encoder", "a_tower_of_text")
    }
    found = plan(nn.ModuleDict(towers), tcur.TCURConfig(rank=2, target_modules=["0", "1"]), 16)
    lines = found.brief()
    names = ["".join(line[0] for line in lines[first : first + 3]) for first in range(1, len(lines), 3)]
    assert names == ["a_tower_of_the_encoder_8x8", "a_tower_of_text_8x8", "total"]
    assert max(map(len, text_table(lines[0], lines[1:]).splitlines())) <= 80


def test_text_and_rows() -> None:
    found: Plan = plan(meta(), tcur.TCURConfig(rank=2), TOKENS)
    text = str(found).splitlines()
    assert len(text) == 1 + 3 * (len(found.stacks) + 1)
    assert "32 x 32" in text[1]
    assert "tcur" in text[2]
    assert [row["method"] for row in found.rows()] == ["base", "tcur", "lora"] * (len(found.stacks) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": tcur.TCURConfig(rank=33)}, r"stack 32x32 \(0.attn.qkv, ...\): rank \(c, r\) = \(33, 33\)"),
        ({"config": tcur.TCURConfig(target_modules=["nothing"])}, "match none of the 12 linear layers"),
        ({"tokens": 0}, "tokens is 0, expected a positive"),
        ({"lora_rank": 0}, "lora_rank is 0, expected a positive"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(meta(), **{"config": tcur.TCURConfig(rank=2)} | change)


def test_an_adapted_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.attn\.qkv of Sequential is adapted already"):
        plan(tcur.inject(build(), tcur.TCURConfig(rank=2)))


LEARNED: dict[str, dict[str, Any]] = {
    "coupled": {"factors": "learned"},
    "own cores": {"factors": "learned", "transform": "identity", "stack_by": "none", "rank": 8},
    "rows alone": {"factors": "learned_rows", "transform": "identity", "stack_by": "none", "rank": 8},
    "trained factors": {"factors": "learned", "trainable": "all"},
}


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED)
def test_files_of_learned_factors_are_those_written(options: dict[str, Any], bits: int, tmp_path: Path) -> None:
    config = tcur.TCURConfig(**{"rank": 2, "target_modules": "|".join([r".*\.linear1", r".*out_proj"])} | options)
    expected = plan(meta(depth=8), config, TOKENS, bits=bits)
    subspace = learned(config, build(depth=8), bits=bits)
    model = tcur.inject(build(depth=8), subspace=subspace)
    for stack in tcur.stacks(model).values():
        for parameter in stack.parameters():  # as training leaves them
            nn.init.normal_(parameter)
    assert expected.tcur.trained == tcur.summary(model).trained
    assert expected.learned is not None
    whole = tcur.save_adapter(model, tmp_path / "adapter.safetensors").stat().st_size
    cores = tcur.save_adapter(model, tmp_path / "cores.safetensors", include_subspace=False).stat().st_size
    alone = subspace.save(tmp_path / "subspace.safetensors").stat().st_size
    assert expected.tcur.file == expected.learned.adapter_file == pytest.approx(whole, rel=0.06)
    assert expected.learned.cores_file == pytest.approx(cores, rel=0.06)
    assert expected.learned.subspace_file == pytest.approx(alone, rel=0.06)
    factors = sum(b.nbytes for n, b in model.named_buffers() if n.endswith((".col", ".row")))
    assert expected.tcur.factors == factors
    assert plan(meta(), tcur.TCURConfig(rank=2), TOKENS).learned is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_warm_up_is_that_of_its_optimizer(dtype: torch.dtype) -> None:
    config = tcur.TCURConfig.preset("learned", rank=2)
    found = plan(meta().to(dtype), config, TOKENS, parts=3).learned
    assert found is not None
    x = torch.linspace(-2, 2, 4 * 3 * 32).view(4, 3, 32).sin().to(dtype)
    made: list[torch.optim.Optimizer] = []
    gradients: list[int] = []

    def step(model: nn.Module) -> Tensor:
        held = [p.grad for p in model.parameters() if p.grad is not None]
        copies = [p.grad for group in made[-1].param_groups for p in group["params"] if p.grad is not None]
        gradients.append(sum({t.data_ptr(): t.nbytes for t in (*held, *copies)}.values()))
        return model(x).float().square().mean()

    def measured(kind: Any, parts: int) -> tuple[int, int]:
        made.clear()
        gradients.clear()

        def make(parameters: Any) -> torch.optim.Optimizer:
            made.append(kind(parameters, lr=1e-3))
            return made[-1]

        tcur.learn_factors(build().to(dtype), config, step, 3, optimizer=make, parts=parts)
        states = [[t for s in opt.state.values() for t in s.values() if t.numel() > 1] for opt in made]
        return max(gradients), max(sum(t.nbytes for t in state) for state in states)

    for name, kind, parts in (
        ("Adam, all layers at once", torch.optim.Adam, 1),
        ("Adam, in 3 parts", torch.optim.Adam, 3),
        ("factored moments, all at once", torch.optim.Adafactor, 1),
        ("factored moments, in 3 parts", torch.optim.Adafactor, 3),
    ):
        warmup = found.warmups[name]
        assert (warmup.gradients, warmup.moments) == measured(kind, parts), name
        assert name in str(found)
    weights = sum(p.numel() for n, p in build().named_parameters() if n.endswith("weight"))
    assert found.warmups["Adam, all layers at once"].moments == 2 * weights * 4
