"""Convolutions through PEFT: added, saved, loaded, merged, in mixed batches, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, dilation=1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 2, 1),
    ).eval()  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def adapted(**options: object) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(network(), TcurLoraConfig(r=4, init_weights=False, **options)).eval()


def test_the_default_is_that_of_inject(x: Tensor) -> None:
    model = adapted()
    names = {name for name, _ in model.base_model.model.named_modules() if name.endswith(".base_layer")}
    found = tcur.inject(network(), tcur.TCURConfig(rank=4))
    assert {name.removesuffix(".base_layer") for name in names} == {p.name for p in tcur.summary(found).covers.adapted}
    assert not torch.allclose(model(x), network()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), network()(x))


def test_without_training_the_output_is_that_of_the_base_bit_for_bit(x: Tensor) -> None:
    model = get_peft_model(network(), TcurLoraConfig(r=4)).eval()
    assert torch.equal(model(x), network()(x))
    model(x).square().sum().backward()
    cores = [p for name, p in model.named_parameters() if p.requires_grad]
    assert len(cores) == 2  # two convolutions share one
    assert all(core.grad is not None and bool(core.grad.any()) for core in cores)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.filterwarnings("error")
def test_all_forms_are_adapted_without_a_warning(kind: type[nn.Module]) -> None:
    model = get_peft_model(nn.Sequential(kind(4, 6, 3)), TcurLoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert (layer.in_features, layer.out_features) == (4, 6)


def test_it_saves_and_loads_bit_for_bit(x: Tensor, tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(network(), tmp_path).eval()(x), model(x))


def test_it_merges_and_unmerges(x: Tensor) -> None:
    model = adapted()
    y = model(x)
    model.merge_adapter(safe_merge=True)
    assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    plain = model.merge_and_unload()
    assert [type(layer) for layer in plain] == [type(layer) for layer in network()]
    assert_close(plain(x), y, rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up_and_share_a_batch(x: Tensor) -> None:
    model = adapted()
    first = model(x)
    model.add_adapter("other", TcurLoraConfig(r=2, init_weights=False, target_modules=["2", "5"]))
    assert torch.equal(model(x), first)
    mixed = model(x, adapter_names=["default", "__base__", "other"])
    assert_close(mixed[0], first[0])
    assert_close(mixed[1], network()(x)[1])
    model.set_adapter("other")
    assert_close(mixed[2], model(x)[2])
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter()
    assert_close(model(x), both, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4))
    with pytest.raises(TypeError, match="1 cannot be adapted: it has 4 groups"):
        get_peft_model(model, TcurLoraConfig(r=2, target_modules=["1"]))
    for names in (None, ["0"]):
        with pytest.raises(ValueError, match=r"^1 is a LazyConv2d, which has no weights before its first input"):
            get_peft_model(
                nn.Sequential(nn.Conv2d(8, 8, 3), nn.LazyConv2d(8, 3)), TcurLoraConfig(r=2, target_modules=names)
            )


def test_to_lora_refuses_a_mode_of_padding_and_writes_the_rest(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pads by 'circular'"):
        tcur.to_lora(adapted(target_modules=["2"]), tmp_path / "lora")
    model = adapted(target_modules=["4"])
    loaded = PeftModel.from_pretrained(network(), tcur.to_lora(model, tmp_path / "lora"))
    assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
