"""What chosen features do: slots and controls, overlaps, activation maps, and the command with its pictures."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tcurlora_ext as tcur
from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.networks import NetworkConfig
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base
from tcurlora_ext.segmentation.scoring import features as module
from tcurlora_ext.segmentation.scoring.features import (
    CHOSEN,
    COLUMN,
    RANDOM,
    ROW,
    activity,
    choice_at,
    choice_of,
    contributions,
    find_slots,
    most_needed,
    overlap,
    patch_grid,
    random_jaccard,
    without,
)

IMAGE = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(finished_run: Path) -> nn.Module:
    return load_adapted(finished_run, "tcur", 0)


def test_slots_name_the_features_and_their_places_by_norm(model: nn.Module) -> None:
    found = find_slots(model)
    assert [slot.stack for slot in found] == [name for name in tcur.stacks(model) for _ in range(4 + 4)]
    for slot in found:
        stack = tcur.stacks(model)[slot.stack]
        assert slot.feature == (stack.rows if slot.side == ROW else stack.columns)[slot.slot]
        assert slot.norm_rank == slot.slot + 1  # the paper's rule takes the largest norms
    assert {slot.layers for slot in find_slots(model, ["16x16"])} == {
        "vit.blocks.*.attn.out_proj, vit.blocks.*.attn.qkv[*]"
    }
    with pytest.raises(ValueError, match=r"stack: found 3x3, expected among .*16x16"):
        find_slots(model, ["3x3"])


def test_without_all_slots_the_output_is_that_of_the_base_with_the_trained_head(
    model: nn.Module, finished_run: Path
) -> None:
    base = load_base(finished_run)
    trained = dict(model.named_parameters())
    base.out.load_state_dict({name: trained[f"out.{name}"] for name in ("weight", "bias")})  # type: ignore[operator, union-attr]
    with torch.no_grad():
        adapted, plain = model(IMAGE), base(IMAGE)
        assert not torch.equal(adapted, plain)
        for side, at in ((ROW, 1), (COLUMN, 0)):
            contexts = [
                without(stack, side, torch.eye(stack.rank[at])[slot])
                for stack, slot in product(tcur.stacks(model).values(), range(4))
            ]
            gone = [context.__enter__() for context in contexts]
            assert all(not stack.core.any() for stack in tcur.stacks(model).values())
            assert torch.equal(model(IMAGE), plain)
            assert sum(gone) > 0
            for context in reversed(contexts):
                context.__exit__(None, None, None)
            assert torch.equal(model(IMAGE), adapted)


def test_a_random_direction_takes_a_part_of_all_slots(model: nn.Module) -> None:
    stack = tcur.stacks(model)["16x16"]
    direction = torch.full((4,), 0.5)
    before = stack.core.detach().clone()
    with without(stack, ROW, direction) as share:
        assert 0 < share < 1
        assert torch.allclose(stack.core @ direction, torch.zeros(()), atol=1e-6)
        assert (stack.core != before).any(dim=(0, 1)).all()
    assert torch.equal(stack.core, before)


def test_what_is_lost_without_each_slot_and_its_control(
    model: nn.Module, finished_run: Path, pristine_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NetworkConfig.read(finished_run / "network.json")
    found = find_slots(model, ["16x16"])[:2]
    weight = tcur.stacks(model)["16x16"].core.detach()
    # Dice that follows from the core stands for predictions
    monkeypatch.setattr(module, "label_dice", lambda *_: [float(weight.abs().sum()), math.nan])
    rows = contributions(model, [], config, ["front", "back"], found)
    assert [row["kind"] for row in rows] == [CHOSEN, RANDOM] * 2
    for row, slot in zip(rows[::2], found, strict=True):
        assert row["feature"] == slot.feature
        assert row["lost front"] == pytest.approx(float(weight[:, :, slot.slot].abs().sum()), rel=1e-4)
        assert row["share"] == pytest.approx(float(weight[:, :, slot.slot].norm() ** 2 / weight.norm() ** 2), rel=1e-4)
        assert math.isnan(row["lost back"])
    assert rows[1]["feature"] is None
    assert rows[1]["share"] != rows[3]["share"]
    other = {**rows[0], "stack": "other", "lost front": rows[0]["lost front"] + rows[2]["lost front"] + 1}
    assert most_needed([*rows, other], ["front", "back"]) == "other"


def test_overlaps_and_what_random_choices_would_have(model: nn.Module, finished_run: Path) -> None:
    own = choice_of(model)
    assert own[next(iter(own))][0] == tcur.stacks(model)[next(iter(own))[0]].rows.tolist()
    assert all(row["jaccard"] == 1 for row in overlap(own, choice_of(load_adapted(finished_run, "tcur", 1))))
    half = {(row["stack"], row["side"]): row for row in overlap(own, choice_at(model, 0.5))}
    assert {row["other_chosen"] for row in half.values()} == {2}
    assert all(row["shared"] == 2 and row["jaccard"] == 0.5 for (_, side), row in half.items() if side == COLUMN)
    assert choice_at(model, 1) == own
    assert max(len(chosen) / count for chosen, count in choice_at(model, 100).values()) == 1
    assert random_jaccard(1, 1, 10) == pytest.approx(0.1)
    drawn = [(set(torch.randperm(9)[:3].tolist()), set(torch.randperm(9)[:5].tolist())) for _ in range(4000)]
    assert random_jaccard(3, 5, 9) == pytest.approx(sum(len(a & b) / len(a | b) for a, b in drawn) / 4000, abs=0.02)
    assert overlap(own, {("16x16", ROW): ([0], 99)}) == []


def test_activation_maps_are_the_layers_own_outputs(model: nn.Module, finished_run: Path, pristine_data: Path) -> None:
    config = NetworkConfig.read(finished_run / "network.json")
    (volume,) = load_volumes(read_dataset(pristine_data).val[:1], config.spacing)
    stack = tcur.stacks(model)["16x16"]
    at = stack.names.index("vit.blocks.1.attn.out_proj")
    found = activity(model, volume, config, stack, at)
    assert found.layer == "vit.blocks.1.attn.out_proj"
    assert found.maps.shape == (8, *volume.image.shape[1:])
    assert found.features[:4] == stack.rows.tolist()
    assert not set(found.features[:4]) & set(found.features[4:])
    assert all(0.5 <= value <= 1 for value in found.separation)
    assert not torch.allclose(found.maps[:4], found.maps[4:])
    # a chosen row reads, up to its length, what the base's layer writes to its output feature
    layer, seen = model.get_submodule(found.layer), []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(IMAGE)
    handle.remove()
    window = activity(model, _Window(volume, IMAGE[0]), config, stack, at).maps[0]  # type: ignore[arg-type]
    row = layer.weight[stack.rows[0]] / layer.weight[stack.rows[0]].norm()  # type: ignore[index, union-attr]
    expected = (seen[0][0] @ row).detach().unflatten(0, patch_grid(config))  # type: ignore[operator]
    step = tuple(slice(1, None, 16 // side) for side in expected.shape)
    assert torch.allclose(window[step], expected, atol=1e-5)
    with pytest.raises(ValueError, match="network: found swinunetr, expected vit or unetr"):
        patch_grid(NetworkConfig("swinunetr", 1, 2, (64, 64, 64)))


class _Window:
    """A volume of one window, without labels."""

    def __init__(self, volume: object, image: torch.Tensor) -> None:
        self.image, self.label = image, torch.zeros_like(image)


def test_the_command_writes_tables_and_pictures_with_controls(finished_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["features", str(finished_run), "--other", str(finished_run), "--stack", "16x16", "--cases", "1",
              "--output", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "without a random direction of the core" in result.output
    rows = read_csv(tmp_path / "features.csv")
    assert [row["kind"] for row in rows] == [CHOSEN, RANDOM] * 8
    assert all(-1 <= float(row[f"lost {label}"]) <= 1 for row in rows for label in ("front", "back"))
    compared = read_csv(tmp_path / "overlap.csv")
    assert {row["compared_with"] for row in compared} == {
        "seed 1", "half the rank", "twice the rank", f"base of {finished_run}"
    }  # fmt: skip
    assert [row["kind"] for row in read_csv(tmp_path / "activations.csv")] == [CHOSEN] * 4 + [RANDOM] * 4
    assert "random rows of the same weight" in result.output
    for name in ("contributions.png", "activations.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    refused = CliRunner().invoke(app, ["features", str(finished_run), "--method", "head"])
    assert refused.exit_code == 2
    assert "found head, which has no stacks" in refused.output
