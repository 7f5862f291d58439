"""Networks of convolutions: what the default adapts, and files, LoRA adapters, learned factors and plans of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.coverage import coverage
from tcurlora_ext.adapter.model.targets import find_targets, group, reasons_by_default
from tcurlora_ext.analysis.plan import plan, trace_calls

CONFIG = tcur.TCURConfig(rank=2)


class Net(nn.Module):
    """An encoder and a decoder, with a 1x1 convolution, a depthwise one and a head of as many classes as the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.side = nn.Conv2d(1, 8, 1)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.middle = nn.Conv2d(8, 72, 1)
        self.narrow = nn.Conv2d(72, 1, 1)
        self.flat = nn.Conv2d(72, 8, 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(8, 8, 2, stride=2) for _ in range(2))
        self.final_conv = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.side(x)
        for layer in (*self.down, self.depthwise, self.middle):
            x = torch.relu(layer(x))
        x = self.flat(x * torch.sigmoid(self.narrow(x)))
        for layer in self.up:
            x = torch.relu(layer(x))
        result: Tensor = self.final_conv(x)
        return result


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(config: tcur.TCURConfig = CONFIG, **options: Any) -> nn.Module:
    model = tcur.inject(network(), config, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            stack.core.normal_()
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def test_the_default_adapts_all_but_stems_heads_and_what_it_cannot() -> None:
    found = tcur.summary(tcur.inject(network(), CONFIG))
    assert {part.name: part.reason for part in found.covers.left_out} == {
        "stem": "a stem", "side": "a stem", "narrow": "narrower than the rank 2", "final_conv": "a head",
        "depthwise": "it has 8 groups, whose kernels see other channels each, expected groups=1",
    }  # fmt: skip
    assert found.adapted == 6
    assert found.covered.startswith("adapted: 6 of 11 convolutions, ")
    assert found.covers.to_json()["convolutions"] == 11


def test_what_is_narrower_than_the_rank_is_told_by_its_output_channels_and_its_matrix() -> None:
    wide = [nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 4, 2, stride=2)]
    narrow = [
        nn.ConvTranspose2d(16, 2, 2, stride=2),
        nn.ConvTranspose2d(3, 16, 2),
        nn.Conv2d(16, 2, 3),
        nn.Conv2d(3, 8, 1),
    ]
    reasons = reasons_by_default(nn.Sequential(*wide, *narrow, nn.Conv2d(3, 8, 3)), tcur.TCURConfig(rank=4))
    assert reasons == {"0": "a stem", "1": "", "2": "", "7": "", **dict.fromkeys("3456", "narrower than the rank 4")}


def test_stacks_are_of_one_kernel_within_a_tower() -> None:
    """``middle`` and a layer of ``down`` have matrices of 72 columns and rows, but other kernels."""
    groups = group(find_targets(network(), CONFIG), CONFIG)
    names = {name: [target.name for target in members] for name, members in groups.items()}
    assert names == {
        "8x8x3x3": ["down.0", "down.1"], "72x8x1x1": ["middle"], "8x72x1x1": ["flat"],
        "transposed_8x8x2x2": ["up.0", "up.1"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"mixes shapes: down\.0 is \(8, 8, 3, 3\), flat is \(8, 72, 1, 1\)"):
        tcur.inject(network(), tcur.TCURConfig(rank=2, target_modules=["down.0", "flat"], stack_by=lambda *_: "one"))


def test_linear_layers_in_repeated_blocks_leave_convolutions_alone() -> None:
    block = lambda: nn.ModuleDict({"fc": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)})  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
    assert [target.name for target in find_targets(model, CONFIG)] == ["blocks.0.fc", "blocks.1.fc"]
    both = tcur.TCURConfig(rank=2, target_modules=["fc", "conv"])
    assert len(find_targets(model, both)) == 4
    said = str(coverage(model, both))
    assert said == "adapted: 2 of 2 linear layers and 2 of 2 convolutions, 100% of their weights"


def test_own_cores_compute_the_ordinary_form(x: Tensor) -> None:
    model = adapted(tcur.TCURConfig.preset("light", rank=2, target_modules=["down.0", "up.0", "flat"]))
    for stack in tcur.stacks(model).values():
        assert not stack.rides
        assert stack.held_col is not None
    merged = tcur.remove(tcur.merge(copy.deepcopy(model)))
    assert_close(merged(x), model(x), rtol=1e-3, atol=1e-4)


def test_files_come_back_bit_for_bit_and_know_their_base(x: Tensor, tmp_path: Path) -> None:
    model = adapted()
    path = tcur.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(tcur.load_adapter(network(), path)(x), model(x))
    assert torch.equal(tcur.load_adapter(tcur.inject(network(), CONFIG), path)(x), model(x))
    other = network()
    other.down[1].weight.data += 0.1
    with pytest.raises(ValueError, match="trained on other base weights: 1 of 2 slices of stack 8x8x3x3"):
        tcur.load_adapter(other, path)


def test_learned_factors_and_measured_inputs(x: Tensor, tmp_path: Path) -> None:
    config = tcur.TCURConfig.preset("learned", rank=2)
    subspace = tcur.learn_factors(network(), config, lambda model: model(x).square().mean(), steps=2)
    model = adapted(config, subspace=subspace)
    path = tcur.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(tcur.load_adapter(network(), path)(x), model(x))
    measured = tcur.TCURConfig(rank=2, selection="activation")
    sizes = tcur.calibrate(network(), measured, [x])
    assert sizes["down.0"].shape == (72,)
    first = network()
    inner = first.stem(x) + first.side(x)
    expected = inner.double().square().mean((0, 2, 3)).sqrt().repeat_interleave(9)
    assert_close(sizes["down.0"], expected)
    tcur.inject(network(), measured, sizes)


def test_to_lora_writes_what_pefts_lora_of_convolutions_computes(x: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(tcur.TCURConfig(rank=2, exclude_modules=["up.0", "up.1"]))
    folder = tcur.to_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(network(), folder)
    assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert_close(loaded.merge_and_unload()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 2), "is a TCURConvTranspose2d, and PEFT's LoRA knows no transposed convolutions"),
        (nn.Conv2d(8, 8, 3, dilation=2), r"has dilation \(2, 2\), which PEFT's LoRA leaves out"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "pads by 'circular', and PEFT's LoRA by zeros"),
    ],
)
def test_to_lora_refuses_what_peft_computes_otherwise(layer: nn.Module, reason: str, tmp_path: Path) -> None:
    model = tcur.inject(nn.Sequential(nn.Conv2d(8, 8, 1), layer), CONFIG)
    with pytest.raises(ValueError, match=f"1 {reason}"):
        tcur.to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_bank_refuses_convolutions_by_name() -> None:
    with pytest.raises(ValueError, match=r"stack 8x8x3x3 has convolutions \(down\.0, \.\.\.\), expected linear layers"):
        tcur.AdapterBank(adapted())


@pytest.mark.parametrize("options", [{}, {"transform": "identity"}, {"trainable": "all"}])
def test_the_plan_counts_what_a_step_computes(options: dict[str, Any], x: Tensor) -> None:
    config = tcur.TCURConfig(rank=2, **options)
    base = network().requires_grad_(False)
    x.requires_grad_()
    planned = plan(base, config, trace_calls(base, config, x))

    def flops(model: nn.Module) -> int:
        # In-place products are not among those that the counter knows.
        in_place = {torch.ops.aten.baddbmm_: lambda a, b, c, **_: 2 * b[0] * b[1] * b[2] * c[2]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    frozen = flops(base)
    found = flops(tcur.inject(copy.deepcopy(base), config)) - frozen
    expected = planned.tcur.forward + planned.tcur.backward
    # Products of matrices without voxels are not counted: some in this network of 64 pixels.
    assert expected <= found
    assert found - expected < 150_000
    depthwise = 2 * 2 * 4 * 8 * 9
    others = sum(2 * 2 * pixels * weights for pixels, weights in ((64, 72 + 8), (64, 16), (4, 72)))
    assert planned.base.forward + planned.base.backward <= frozen
    assert frozen - planned.base.forward - planned.base.backward <= 2 * (others + depthwise)


def test_a_plan_for_a_number_of_voxels() -> None:
    planned = plan(network(), CONFIG, 64)
    down = next(stack for stack in planned.stacks if stack.name == "8x8x3x3")
    assert (down.shape, down.q, down.tokens) == ((8, 72), 4, 128)
    assert down.tcur.saved == 2 * 64 * 4 * 4  # h of both layers in float32
    assert down.lora.saved == 2 * 4 * (64 * 8 + 4 * 64 * 8)  # h, and x with stride^2 times as many pixels
