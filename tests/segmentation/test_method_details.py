"""What is particular to one method: its definition, what its file holds, and what it refuses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.maths.tproduct import tprod, tsvd, ttranspose
from tcurlora_ext.segmentation.methods import METHODS, MethodOptions, Task, Unset, get_methods
from tcurlora_ext.segmentation.methods.adalora import RankBudget
from tcurlora_ext.segmentation.methods.configuring import config_options
from tcurlora_ext.segmentation.methods.hyps import ParallelSerial
from tcurlora_ext.segmentation.methods.lora_pt import PrincipalLinear, PrincipalStack
from tcurlora_ext.segmentation.methods.lora_sb import FACTORS
from tcurlora_ext.segmentation.methods.lora_xs import CoreLinear
from tcurlora_ext.segmentation.methods.wrapping import leading_vectors
from tcurlora_ext.segmentation.networks import get_spec, target_layers
from tcurlora_ext.segmentation.prediction.predictor import load_files
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import train, trainable

SPEC = get_spec("vit")
IMAGE = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def prepared(name: str, base: Path, task: Task | None = None, seed: int = 0) -> tuple[nn.Module, MethodOptions]:
    """A model of a method that has its own options after its name, and all options."""
    (method,) = get_methods(name)
    options = MethodOptions(own=method.own, seed=seed)
    model = load_base(base.parent)
    method.prepare(model, SPEC, options, task)
    return model.eval(), options


def test_leading_vectors_do_not_depend_on_the_signs_of_an_svd() -> None:
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    left, values, right = leading_vectors(matrix, 5)
    assert torch.allclose(left * values @ right.T, matrix, atol=1e-6)  # float32 factors
    other, _, negated = leading_vectors(-matrix, 5)
    assert torch.allclose(other, left, atol=1e-6)
    assert torch.allclose(negated, -right, atol=1e-6)


def test_hyps_splits_the_weight_and_both_branches_train_from_the_first_step() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 10), torch.randn(7, 12)
    weight, plain = linear.weight.detach().clone(), linear(x).detach()
    layer = ParallelSerial(linear.requires_grad_(False), rank=3, width=4, split=True)
    assert torch.allclose(layer(x), plain, atol=1e-6)
    parallel = layer.parallel_out @ layer.parallel_in
    values = torch.linalg.svdvals(weight)
    # the best approximation of rank 3 leaves the other singular values; the frozen residual is exactly that rest
    assert torch.allclose((weight - parallel).norm(), values[3:].norm(), atol=1e-5)
    assert torch.allclose(linear.weight + parallel, weight, atol=1e-6)
    assert torch.allclose(layer.parallel_out.norm(dim=0).square(), values[:3], atol=1e-5)
    layer(x).square().sum().backward()
    for name in ("parallel_out", "parallel_in", "serial.up.weight", "serial.up.bias"):
        gradient = layer.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.count_nonzero() > 0, name
    with torch.no_grad():
        layer.serial.up.weight += 1
        y = linear(x) + x @ parallel.T
        expected = y + torch.relu(y @ layer.serial.down.weight.T + layer.serial.down.bias).sum(1, keepdim=True)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_the_factors_of_lora_pt_are_the_principal_part_of_the_tensor_svd() -> None:
    weights = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2))
    stack = PrincipalStack(weights, rank=2)
    left, middle, right = tsvd(weights)
    first = tprod(tprod(left[:, :, :2], middle[:, :2, :2]), ttranspose(right[:, :, :2]))
    assert stack.delta_weights().count_nonzero() == 0
    with torch.no_grad():
        stack.middle += 0.1
        changed = tprod(tprod(stack.left, stack.middle), ttranspose(stack.right))
    # W + (P - P at the start) is the frozen rest W - P at the start, plus P
    assert torch.allclose(stack.delta_weights(), changed - first, atol=1e-5)
    assert stack.delta_weights().abs().max() > 0.1


def test_lora_pt_stacks_q_k_and_v_as_slices_of_their_own(base: Path) -> None:
    model, _ = prepared("lora-pt:rank=4", base)
    layers = [module for module in model.modules() if isinstance(module, PrincipalLinear)]
    assert len(layers) == len(target_layers(load_base(base.parent)))
    shapes = {id(layer.stack): tuple(layer.stack.delta_weights().shape) for layer in layers}
    assert sorted(shapes.values()) == [(2, 16, 32), (2, 32, 16), (8, 16, 16)]


def test_lora_pt_sees_changed_factors_with_and_without_gradients(base: Path) -> None:
    model, _ = prepared("lora-pt:rank=4", base)
    with torch.no_grad():
        before = model(IMAGE)
        assert torch.equal(model(IMAGE), before)
        next(p for name, p in model.named_parameters() if name.endswith(".left")).mul_(1.5)
        after = model(IMAGE)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(model(IMAGE).detach(), after)
    assert METHODS["lora-pt"].merge is not None
    METHODS["lora-pt"].merge(model)
    assert torch.allclose(model(IMAGE), after, atol=1e-5)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_lora_sb_begins_at_the_best_approximation_of_a_sign_step(base: Path, task: Task) -> None:
    model, _ = prepared("lora-sb:rank=16:batches=1:step=0.01", base, task)  # the full rank of every weight here
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CoreLinear)}
    assert set(layers) == set(target_layers(load_base(base.parent)))
    for name, layer in layers.items():
        step = layer.delta_weight()
        # a sign step changes every entry by the step's size; an entry without gradient, by nothing
        assert torch.allclose(step.abs(), torch.full_like(step, 0.01), atol=1e-6), name
        assert torch.allclose(layer.left.T @ layer.left, torch.eye(16), atol=1e-5), name


def test_lora_sb_keeps_its_factors_for_a_run_that_goes_on(base: Path, task: Task) -> None:
    first, options = prepared("lora-sb:rank=2:batches=1", base, task)
    assert (task.folder / FACTORS).is_file()
    again, _ = prepared("lora-sb:rank=2:batches=1", base, replace(task, volumes=()))  # it takes no further gradient
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="lora-sb takes its factors from gradients on the training cases"):
        prepared("lora-sb", base)
    assert METHODS["lora-sb"].warm_up(options) == 1
    with pytest.raises(ValueError, match="lora-sb: batches is '0', expected a whole number above 0"):
        prepared("lora-sb:batches=0", base, replace(task, folder=task.folder / "other"))


def test_adalora_ends_with_its_budget_and_goes_on_as_if_never_stopped(base: Path, task: Task, tmp_path: Path) -> None:
    task = replace(task, plan=replace(task.plan, steps=6, checkpoint_every=3))
    whole, _ = prepared("adalora:rank=2", base, task)
    train(whole, task.volumes, task.plan, tmp_path / "whole")
    entries = [p for name, p in whole.named_parameters() if ".lora_E." in name]
    assert sum(int(p.count_nonzero()) for p in entries) == 2 * len(entries)  # 3 each at the start

    class Stopped(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 4:
            raise Stopped

    part, _ = prepared("adalora:rank=2", base, task)
    with pytest.raises(Stopped):
        train(part, task.volumes, task.plan, tmp_path / "part", on_step=stop)
    again, _ = prepared("adalora:rank=2", base, task)
    train(again, task.volumes, task.plan, tmp_path / "part")  # from the checkpoint of step 3
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adaloras_penalty_is_that_of_peft(base: Path, task: Task) -> None:
    from peft import AdaLoraConfig
    from peft.tuners import AdaLoraModel

    class Output:
        loss = torch.zeros(())

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self) -> Output:
            return Output()

    config = AdaLoraConfig(target_r=2, init_r=3, total_step=4, target_modules=["layer"], orth_reg_weight=0.3)
    tuner = AdaLoraModel(Plain(), config, "default")
    expected = tuner.forward().loss  # PEFT adds its penalty to the loss of what a model returns
    assert expected > 0
    assert torch.allclose(RankBudget(tuner, 0.3).penalty(), expected, rtol=1e-6)


def test_adalora_refuses_a_scaled_loss(base: Path, task: Task) -> None:
    with pytest.raises(ValueError, match="adalora: found amp fp16, expected bf16 or off"):
        prepared("adalora", base, replace(task, plan=replace(task.plan, amp="fp16")))


def test_curlora_has_a_core_for_each_layer_over_columns_drawn_by_the_seed(base: Path) -> None:
    model, _ = prepared("curlora:rank=4", base)
    stacks = tcur.stacks(model)
    assert len(stacks) == len(target_layers(load_base(base.parent)))
    assert all(tuple(stack.core.shape) == (1, 4, 4) for stack in stacks.values())
    other = tcur.stacks(prepared("curlora:rank=4", base, seed=1)[0])
    assert any(not torch.equal(stack.columns, other[name].columns) for name, stack in stacks.items())
    model, _ = prepared("curlora:rank=4:raw=true", base)
    raw = next(iter(tcur.stacks(model).values()))
    weight = load_base(base.parent).get_submodule(raw.names[0]).weight
    assert isinstance(weight, torch.Tensor)
    assert raw.scale == 1
    assert torch.equal(raw.row, weight.detach()[raw.rows])
    assert torch.equal(raw.col, weight.detach()[:, raw.columns])


def test_tcur_trains_norms_where_it_is_asked_to(base: Path, tmp_path: Path, train_steps: Callable[..., None]) -> None:
    (method,) = get_methods("tcur:rank=4:norms=true")
    model, options = prepared("tcur:rank=4:norms=true", base)
    norms = [name for name in trainable(model) if "norm" in name]
    assert norms
    assert set(norms) == {name for name in trainable(prepared("norms", base)[0]) if "norm" in name}
    train_steps(model)
    path = tmp_path / "adapter.safetensors"
    method.save(model, path, options)
    other = load_base(base.parent)
    method.load(other, path, SPEC, method.prepare)
    with torch.no_grad():
        assert torch.equal(other.eval()(IMAGE), model.eval()(IMAGE))


def test_tcur_has_every_option_of_its_configuration_that_a_word_can_give(base: Path) -> None:
    options = METHODS["tcur"].options
    for name, value in asdict(tcur.TCURConfig()).items():
        by_word = name not in ("seed", "factors", "target_modules", "exclude_modules", "split_fused", "rank_pattern")
        assert (name in options) == by_word
        if by_word and name not in ("rank", "alpha"):
            assert options[name] == value or (isinstance(options[name], Unset) and value is None)
    name = "tcur:selection=uniform:stack_blocks=1:frequencies=1:scale=0.5:rank=2:alpha=3:dropout=0.1"
    (stack, *_) = tcur.stacks(prepared(name, base)[0]).values()
    assert (stack.rank, stack.core.shape[0], stack.scale, stack.options.selection) == ((2, 2), 1, 0.5, "uniform")
    (light, *_) = tcur.stacks(prepared("tcur-light:rank=4:transform=dct:stack_by=role", base)[0]).values()
    assert (light.slices, light.options.transform, light.options.orthonormal) == (2, "dct", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tcur:stack_by=colour", "stack_by is 'colour', expected one of"),
        ("tcur:transform=dct:frequencies=2", "frequencies is 2, expected transform 'dft'"),
        ("tcur:order=backwards", "order is 'backwards', expected one of network, role, random"),
        ("tcur:rank=2:frequencies=0", "frequencies is 0, expected a positive whole number"),
    ],
)
def test_tcur_refuses_what_its_configuration_does(name: str, message: str, base: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared(name, base)


@pytest.mark.parametrize("options", ["order=random", "order=role", "selection=activation", "trainable=all"])
def test_a_file_keeps_order_selection_and_factors(
    options: str, base: Path, task: Task, tmp_path: Path, train_steps: Callable[..., None]
) -> None:
    (method,) = get_methods(f"tcur:rank=4:{options}")
    model, own = prepared(method.name, base, task)
    train_steps(model)
    path = tmp_path / "adapter.safetensors"
    method.save(model, path, own)
    other = load_base(base.parent)
    method.load(other, path, SPEC, method.prepare)
    with torch.no_grad():
        assert torch.equal(other.eval()(IMAGE), model.eval()(IMAGE))
    plain = tcur.stacks(prepared("tcur:rank=4", base)[0])
    found, first = tcur.stacks(other)["16x16"], plain["16x16"]
    roles = [name.partition(".attn.")[2].partition("[")[0] for name in found.names]
    assert sorted(found.names) == sorted(first.names)
    assert (found.names == first.names) == (not options.startswith("order"))
    if options == "order=role":
        assert roles == ["out_proj"] * 2 + ["qkv"] * 6
    if options == "selection=activation":  # other columns than by the weights alone
        assert not torch.equal(found.columns, first.columns)


@pytest.mark.parametrize("name", ["lora-xs", "bitfit", "norms"])
def test_a_file_by_itself_says_which_method_reads_it(name: str, base: Path, tmp_path: Path) -> None:
    model, options = prepared(name, base)
    path = tmp_path / "adapter.safetensors"
    METHODS[name].save(model, path, options)
    with safe_open(path, "pt") as file:
        assert file.metadata()["method"] == name
    predictor = load_files(path, base)
    assert set(trainable(predictor.models[0])) == set(trainable(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora-xs:rank=17", r"vit\.blocks\.0\..*: rank is 17, expected 1 to 16 for a weight of"),
        ("lora-pt:rank=17", "stack .*: rank is 17, expected 1 to 16"),
        ("hyps:rank=17", "rank is 17, expected 1 to 16"),
    ],
)
def test_a_rank_that_does_not_fit_is_named(name: str, message: str, base: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(name, base)


def test_a_run_of_several_methods_counts_warm_up_and_reads_its_files(
    settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    names = ("lora-sb:batches=1", "adalora:rank=2", "hyps:rank=2")
    rows = finetune(settings(methods=names, steps=2), tmp_path / "run")
    assert [row["method"] for row in rows] == list(names)
    assert [row["warm_up_steps"] for row in read_csv(tmp_path / "run" / "metrics.csv")] == ["1", "0", "0"]
    for name in names:
        assert load_adapted(tmp_path / "run", name)(IMAGE).isfinite().all()


def test_colours_of_methods_can_be_told_apart() -> None:
    def rgb(colour: str) -> list[int]:
        return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]

    for (one, a), (other, b) in itertools.combinations(METHODS.items(), 2):
        distance = sum((x - y) ** 2 for x, y in zip(rgb(a.colour), rgb(b.colour), strict=True)) ** 0.5
        assert distance > 35, (one, other)  # of 441 between black and white


def test_the_page_of_commands_has_every_method_with_its_options() -> None:
    page = Path(__file__).parents[2] / "docs" / "commands.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == 6]
    found = {row[0].strip("`"): row[2] for row in rows}
    assert set(found) == set(METHODS)
    for name, method in METHODS.items():
        named = re.findall(r"`(\w+)", found[name])
        if {"TCURConfig", "tcur"} & set(named):  # which has too many to name them all
            assert set(named) - {"TCURConfig", "tcur"} <= set(method.options), name
            assert set(config_options(tcur.TCURConfig())) | {"order", "norms"} == set(method.options), name
        else:
            assert named == list(method.options), name
