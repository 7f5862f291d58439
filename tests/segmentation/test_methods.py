"""Each method trains what it says and nothing else, and its file brings the adapted network back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.methods import METHODS, MethodOptions, get_methods
from tcurlora_ext.segmentation.networks import get_spec, has_prefix
from tcurlora_ext.segmentation.run import load_base
from tcurlora_ext.segmentation.training import Plan, train, trainable

OPTIONS = MethodOptions(rank=4, lora_rank=2, seed=0)
EXTRA = {"lora": "lora_", "tcur": "core"}  # what the names of an adapter's own parameters contain


def plain_name(name: str) -> str:
    """The name in the network before an adapter was put in."""
    return name.replace(".base_layer", "")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def train_steps(pristine_data: Path, tmp_path: Path) -> Callable[[nn.Module], None]:
    volumes = load_volumes(read_dataset(pristine_data).train, None)

    def run(model: nn.Module) -> None:
        train(model, volumes, Plan(3, 2, 1e-2, 0, (16, 16, 16)), tmp_path / "steps")

    return run


def expected_to_train(method: str, also_train: str) -> Callable[[str], bool]:
    spec = get_spec("vit")
    beside = spec.head if also_train == "head" else spec.decoder
    rules: dict[str, Callable[[str], bool]] = {
        "head": lambda name: has_prefix(name, spec.head),
        "decoder": lambda name: has_prefix(name, spec.decoder),
        "full": lambda name: True,
        "lora": lambda name: EXTRA["lora"] in name or has_prefix(name, beside),
        "tcur": lambda name: EXTRA["tcur"] in name or has_prefix(name, beside),
    }
    return rules[method]


@pytest.mark.parametrize("also_train", ["head", "decoder"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(
    name: str, also_train: str, base: Path, train_steps: Callable[[nn.Module], None]
) -> None:
    model, spec = load_base(base.parent), get_spec("vit")
    weights = {key: value.clone() for key, value in snapshot(model).items()}
    METHODS[name].prepare(model, spec, MethodOptions(also_train, rank=4, lora_rank=2))
    should = expected_to_train(name, also_train)
    assert set(trainable(model)) == {key for key in snapshot(model) if should(key)}
    before = snapshot(model)
    train_steps(model)
    after = snapshot(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    # norm_cross_attn has no part in MONAI's forward pass, so it has no gradient whoever trains it
    assert moved == {key for key in before if should(key) and "norm_cross_attn" not in key}
    for key, value in weights.items():  # frozen ones are the base's, bit by bit
        if not should(key):
            (found,) = [other for other in after if plain_name(other) == key]
            assert torch.equal(after[found], value), key


def test_the_core_of_tcur_moves_and_changes_the_weights(base: Path, train_steps: Callable[[nn.Module], None]) -> None:
    """The released code of the method left its core out of optimizer and forward pass: only the decoder trained."""
    model = load_base(base.parent)
    METHODS["tcur"].prepare(model, get_spec("vit"), OPTIONS)
    assert tcur.stacks(model)
    assert all(stack.core.count_nonzero() == 0 for stack in tcur.stacks(model).values())
    train_steps(model)
    for name, stack in tcur.stacks(model).items():
        assert stack.core.count_nonzero() == stack.core.numel(), name
        assert stack.delta_weights().abs().amax(dim=(1, 2)).min() > 0, name


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_brings_the_adapted_network_back(
    name: str, base: Path, tmp_path: Path, train_steps: Callable[[nn.Module], None]
) -> None:
    method, spec = METHODS[name], get_spec("vit")
    model, image = load_base(base.parent), torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        plain = model(image)
        method.prepare(model, spec, OPTIONS)
        if name in EXTRA:
            assert torch.allclose(model.eval()(image), plain, atol=1e-6)  # an adapter starts as the identity
    train_steps(model)
    path = tmp_path / "adapter.safetensors"
    method.save(model, path, OPTIONS)
    other = load_base(base.parent)
    method.load(other, path, spec, method.prepare)
    with torch.no_grad():
        adapted = model.eval()(image)
        assert torch.equal(other.eval()(image), adapted)
        assert not torch.allclose(adapted, plain, atol=1e-3)


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


@pytest.mark.parametrize("names", ["loar", "", "head,head", ["head", "none"]])
def test_unknown_or_repeated_methods_are_refused(names: str | list[str]) -> None:
    with pytest.raises(ValueError, match="expected each once of head, decoder, full, lora, tcur"):
        get_methods(names)
