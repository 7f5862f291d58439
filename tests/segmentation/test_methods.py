"""Each method trains what it says and nothing else, and its file brings the adapted network back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.methods import METHODS, STANDARD, Method, MethodOptions, Task, get_methods
from tcurlora_ext.segmentation.networks import get_spec, has_prefix
from tcurlora_ext.segmentation.runs.learning import LearnSettings, learn
from tcurlora_ext.segmentation.runs.network import load_base
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Plan, trainable

OPTIONS = MethodOptions(rank=4, lora_rank=2, seed=0)
CORES = ("tcur", "tcur-light", "tcur-learned", "tcur-carried", "curlora", "lora-xs", "lora-sb")
# What the names of an adapter's own parameters contain, one or the other.
EXTRA = (
    dict.fromkeys(("lora", "pissa", "dora", "adalora"), ("lora_",)) | dict.fromkeys(CORES, ("core",))
    | dict.fromkeys(("hyps", "cps"), (".parallel_in", ".parallel_out", ".serial."))
    | {"lora-pt": (".left", ".middle", ".right"), "adapter": (".bottleneck.",), "ssf": (".factor", ".shift"),
       "vera": ("vera_lambda_",), "psoft": ("psoft_R",), "unilora": ("unilora_theta_d",)}
)  # fmt: skip
# Options with which a method fits the tiny network.
SMALL = {
    "tcur-light": ":rank=4", "tcur-learned": ":rank=2:warm_up=3", "tcur-carried": ":rank=2", "psoft": ":rank=4",
    "lora-pt": ":rank=4", "lora-sb": ":batches=2", "unilora": ":length=64", "adapter": ":width=4",
}  # fmt: skip
# Those that split a weight into what trains and a frozen residual; others leave the weights of the base as they are.
SPLIT = {"pissa": ("lora_B.default.weight", "lora_A.default.weight"), "hyps": ("parallel_out", "parallel_in")}
# LoRA-SB starts at an approximation of a first step, Uni-LoRA near the base.
ELSEWHERE = ("lora-sb", "unilora")
# Those whose start is that of the base bit for bit; for the others it is so up to rounding.
EXACT = ("lora-pt", "lora-xs", "adapter", "ssf", "cps", "curlora", "lora", "adalora", "vera", "bitfit", "norms")
# Those that fold into weights of a plain network.
MERGES = (*CORES, "lora", "pissa", "dora", "adalora", "vera", "psoft", "unilora", "lora-pt", "ssf")


def plain_name(name: str) -> str:
    """The name in the network before an adapter was put in."""
    return name.replace(".base_layer", "")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def subspace(pristine_data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace learned on the tiny data."""
    path = tmp_path_factory.mktemp("factors") / "family.safetensors"
    config = tcur.TCURConfig.preset("learned", rank=2)
    learn(LearnSettings(FinetuneSettings(pristine_data, base), config, steps=3), path)
    return path


@pytest.fixture
def chosen(subspace: Path) -> Callable[[str], Method]:
    """A method by its name, with options with which it fits."""

    def choose(name: str) -> Method:
        (method,) = get_methods([name + SMALL.get(name, "")], {"factors": subspace})
        return method

    return choose


def expected_to_train(method: str, also_train: str) -> Callable[[str], bool]:
    spec = get_spec("vit")
    beside = spec.head if also_train == "head" else spec.decoder
    rules: dict[str, Callable[[str], bool]] = {
        "head": lambda name: has_prefix(name, spec.head),
        "decoder": lambda name: has_prefix(name, spec.decoder),
        "full": lambda name: True,
        "norms": lambda name: ("norm" in name and "cross" not in name) or has_prefix(name, beside),
        "bitfit": lambda name: (
            (name.startswith("vit.") and name.endswith(".bias") and "cross" not in name) or has_prefix(name, beside)
        ),
    }
    if method in rules:
        return rules[method]
    return lambda name: any(part in name for part in EXTRA[method]) or has_prefix(name, beside)


@pytest.mark.parametrize("also_train", ["head", "decoder"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(
    name: str, also_train: str, base: Path, train_steps: Callable[..., None],
    chosen: Callable[[str], Method], task: Task,
) -> None:  # fmt: skip
    model, spec, method = load_base(base.parent), get_spec("vit"), chosen(name)
    weights = {key: value.clone() for key, value in snapshot(model).items()}
    method.prepare(model, spec, MethodOptions(also_train, rank=4, lora_rank=2, own=method.own), task)
    should = expected_to_train(name, also_train)
    assert set(trainable(model)) == {key for key in snapshot(model) if should(key)}
    before = snapshot(model)
    train_steps(model, 2)  # what has no gradient in the first step has one in the second
    after = snapshot(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    # norm_cross_attn has no part in MONAI's forward pass, so it has no gradient whoever trains it
    assert moved == {key for key in before if should(key) and "norm_cross_attn" not in key}
    for key, value in weights.items():  # frozen ones are the base's, bit by bit
        if not should(key):
            (found,) = [other for other in after if plain_name(other) == key]
            own = [found.replace("base_layer.weight", part) for part in SPLIT.get(name, ())]
            if own and "base_layer.weight" in found:
                split = after[found] + before[own[0]] @ before[own[1]]
                assert torch.allclose(split, value, atol=1e-6), key  # rounding of a sum of numbers below 1
            else:
                assert torch.equal(after[found], value), key


def test_the_core_of_tcur_moves_and_changes_the_weights(base: Path, train_steps: Callable[..., None]) -> None:
    """The released code of the method left its core out of optimizer and forward pass: only the decoder trained."""
    model = load_base(base.parent)
    METHODS["tcur"].prepare(model, get_spec("vit"), OPTIONS, None)
    assert tcur.stacks(model)
    assert all(stack.core.count_nonzero() == 0 for stack in tcur.stacks(model).values())
    train_steps(model)
    for name, stack in tcur.stacks(model).items():
        assert stack.core.count_nonzero() == stack.core.numel(), name
        assert stack.delta_weights().abs().amax(dim=(1, 2)).min() > 0, name


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_brings_the_adapted_network_back(
    name: str, base: Path, tmp_path: Path, train_steps: Callable[..., None], chosen: Callable[[str], Method],
    task: Task,
) -> None:  # fmt: skip
    method, spec = chosen(name), get_spec("vit")
    options = replace(OPTIONS, own=method.own)
    model, image = load_base(base.parent), torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        plain = model(image)
    method.prepare(model, spec, options, task)
    with torch.no_grad():
        start = model.eval()(image)
        if name in EXACT:
            assert torch.equal(start, plain)
        elif name in EXTRA and name not in ELSEWHERE:
            assert torch.allclose(start, plain, atol=1e-6)  # an adapter starts as the identity
    train_steps(model)
    path = tmp_path / "adapter.safetensors"
    method.save(model, path, options)
    other = load_base(base.parent)
    method.load(other, path, spec, method.prepare)
    with torch.no_grad():
        adapted = model.eval()(image)
        assert torch.equal(other.eval()(image), adapted)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        assert (method.merge is not None) == (name in MERGES)
        if method.merge is not None:
            method.merge(other)
            # sums of another order through two blocks; the adapter has moved the output by more than 1e-3
            assert torch.allclose(other(image), adapted, atol=2e-5)
            assert name in CORES[:5] or set(other.state_dict()) >= set(load_base(base.parent).state_dict())


@pytest.mark.parametrize("name", ["head", "tcur"])
def test_a_damaged_or_missing_adapter_file_is_named(name: str, base: Path, tmp_path: Path) -> None:
    method, path = METHODS[name], tmp_path / "adapter.safetensors"
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors"):
        method.load(load_base(base.parent), path, get_spec("vit"), method.prepare)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        method.load(load_base(base.parent), path, get_spec("vit"), method.prepare)


@pytest.mark.parametrize("header", [None, {"options": "{"}, {"options": '{"ranks": 3}'}], ids=str)
def test_a_file_without_this_commands_options_is_named(
    header: dict[str, str] | None, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({"out.weight": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: not an adapter written by this command"):
        METHODS["head"].load(load_base(base.parent), path, get_spec("vit"), METHODS["head"].prepare)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("loar", "'loar'"), ("", "''"), ("head,head,lora", "'head' more than once"), (["head", "none"], "'none'"),
        ("lora,loar,head,head,tcru:rank=2", "'loar,tcru:rank=2'"), ([], "''"),
    ],
)  # fmt: skip
def test_unknown_or_repeated_methods_are_named(names: str | list[str], found: str) -> None:
    with pytest.raises(ValueError, match=f"method: found {found}, expected each once of head, decoder, full, lora"):
        get_methods(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora:ranks=1", "found 'ranks=1' after lora, expected OPTION=VALUE with one of rank, bits, init"),
        ("lora:rank", "found 'rank' after lora"),
        ("head:rank=1", "it has none"),
        ("lora:rank=one", "lora: rank is 'one', expected a whole number"),
        ("lora:rank=0", "lora: rank is '0', expected a whole number above 0"),
        ("adalora:rank=-1", "adalora: rank is '-1', expected a whole number above 0"),
        ("vera:rank=0", "vera: rank is '0', expected a whole number above 0"),
        ("tcur:alpha=0", "tcur: alpha is '0', expected a number above 0"),
        ("tcur-carried:factors=x:alpha=nan", "alpha is 'nan', expected a number above 0"),
        ("curlora:alpha=inf", "alpha is 'inf', expected a number above 0"),
        ("hyps:width=0", "hyps: width is '0', expected a whole number above 0"),
        ("tcur:orthonormal=1", "orthonormal is '1', expected true or false"),
        ("tcur:frequencies=two", "frequencies is 'two', expected a whole number"),
        ("tcur-light:scale=big", "scale is 'big', expected a number"),
        ("tcur:seed=3", "found 'seed=3' after tcur, expected OPTION=VALUE with one of rank, selection, "),
        ("tcur-carried", "tcur-carried needs factors, as in tcur-carried:factors=FILE"),
        ("lora:init=a/x,lora:init=b/x", "found lora:init=x more than once"),
    ],
)
def test_wrong_options_of_a_method_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_methods(name)


def test_methods_with_options_run_side_by_side() -> None:
    methods = get_methods("lora,lora:rank=1,tcur:orthonormal=true:alpha=2")
    assert [method.name for method in methods] == ["lora", "lora:rank=1", "tcur:orthonormal=true:alpha=2.0"]
    assert [method.folder for method in methods] == ["lora", "lora_rank=1", "tcur_orthonormal=true_alpha=2.0"]
    assert methods[2].own == {"orthonormal": True, "alpha": 2.0}
    assert [method.name for method in get_methods("all")] == list(STANDARD)


@pytest.mark.parametrize("bits", [1, 4])
def test_a_lora_in_few_bits(bits: int, base: Path, tmp_path: Path, train_steps: Callable[..., None]) -> None:
    whole, (coded,) = METHODS["lora"], get_methods(f"lora:rank=4:bits={bits}")
    model, spec, options = load_base(base.parent), get_spec("vit"), replace(OPTIONS, own=coded.own)
    coded.prepare(model, spec, options, None)
    train_steps(model)
    sizes = {}
    for method, own in ((whole, {"rank": 4}), (coded, coded.own)):
        path = tmp_path / f"{method.folder}.safetensors"
        method.save(model, path, replace(OPTIONS, own=own))
        other = load_base(base.parent)
        method.load(other, path, spec, method.prepare)
        sizes[method.name] = path.stat().st_size
        found, expected = (
            torch.cat([p.detach().flatten() for n, p in one.named_parameters() if "lora_" in n])
            for one in (other, model)
        )
        off = float((found - expected).norm() / expected.norm())
        assert off == 0 if method is whole else 0 < off < {1: 0.75, 4: 0.15}[bits]
    assert sizes[coded.name] < sizes["lora"]


def test_a_lora_that_begins_with_another_runs_factors(
    base: Path, tmp_path: Path, train_steps: Callable[..., None]
) -> None:
    method, spec = METHODS["lora"], get_spec("vit")
    model = load_base(base.parent)
    method.prepare(model, spec, OPTIONS, None)
    train_steps(model)
    method.save(model, tmp_path / "first.safetensors", OPTIONS)
    (second,) = get_methods(f"lora:init={tmp_path / 'first.safetensors'}")
    other = load_base(base.parent)
    task = Task((), Plan(3, 2, 1e-2, 0, (16, 16, 16)), torch.device("cpu"), tmp_path)
    second.prepare(other, spec, replace(OPTIONS, own=second.own, seed=1), task)
    for name, p in other.named_parameters():
        if "lora_" in name:
            assert torch.equal(p, model.get_parameter(name)), name


@pytest.mark.parametrize("name", ["tcur-learned:rank=2:warm_up=2", "lora-sb:rank=2:batches=2"])
def test_a_warm_up_is_said_when_it_begins(base: Path, task: Task, name: str) -> None:
    (method,), spec, said = get_methods(name), get_spec("vit"), list[str]()
    options = replace(OPTIONS, own=method.own)
    for _ in range(2):  # the second time it goes on with what it has learned
        method.prepare(load_base(base.parent), spec, options, replace(task, say=said.append))
    assert [text.split(",")[0].rsplit(" ", 1)[0] for text in said] == ["a warm-up of 2"]
