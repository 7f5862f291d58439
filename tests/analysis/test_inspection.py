"""Norms and frequencies of an adapter, against its dense dW."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.files.format import read_adapter
from tcurlora_ext.analysis.inspection import inspect_file, inspect_model
from tcurlora_ext.maths import selection


def adapted(transform: str = "dft", slices: int = 6, domain: str = "fourier") -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"attn": nn.ModuleDict({"proj": nn.Linear(12, 10)})}) for _ in range(slices)]
    config = tcur.TCURConfig(rank=(2, 3), transform=transform, core_domain=domain)
    return tcur.inject(nn.Sequential(*layers).double(), config)


def randomised(model: nn.Module) -> tcur.TCURStack:
    (stack,) = tcur.stacks(model).values()
    nn.init.normal_(stack.core)
    return stack


@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_norms_are_those_of_the_dense_delta(transform: str, slices: int, domain: str) -> None:
    model = adapted(transform, slices, domain)
    stack = randomised(model)
    (found,) = inspect_model(model)
    dense = stack.delta_weights().detach()
    assert found.base is not None
    torch.testing.assert_close(torch.tensor(found.base.delta_norms).double(), dense.norm(dim=(1, 2)))
    torch.testing.assert_close(torch.tensor(found.core_norms).double(), stack.core_slices().norm(dim=(1, 2)))
    if transform == "identity":
        assert found.base.delta_energy == found.core_energy == []
        return
    frequencies = slices // 2 + 1 if transform == "dft" else slices
    assert len(found.base.delta_energy) == len(found.core_energy) == frequencies
    assert sum(found.base.delta_energy) == pytest.approx(float(dense.square().sum()))
    assert sum(found.core_energy) == pytest.approx(float(stack.core.detach().square().sum()))


@pytest.mark.parametrize("slices", [5, 6])
@pytest.mark.parametrize("frequency", [0, 1, 2, 3])
def test_a_core_of_one_frequency_has_its_energy_there(slices: int, frequency: int) -> None:
    if frequency > slices // 2:
        pytest.skip("no such frequency")
    model = adapted(slices=slices)
    (stack,) = tcur.stacks(model).values()
    wave = torch.cos(2 * math.pi * frequency * torch.arange(slices, dtype=torch.float64) / slices)
    stack.set_core_slices(wave[:, None, None] * torch.randn(2, 3, dtype=torch.float64))
    (found,) = inspect_model(model)
    assert found.base is not None
    # The change has the spectrum of dense matrices too: all its energy in that frequency.
    dense = torch.fft.rfft(stack.delta_weights(), dim=0).abs().square().sum((1, 2))
    for energy in (found.core_energy, found.base.delta_energy, dense.tolist()):
        share = [value / sum(energy) for value in energy]
        assert share[frequency] == pytest.approx(1.0)


def test_choices_and_scores_are_the_stacks() -> None:
    model = adapted()
    stack = randomised(model)
    (found,) = inspect_model(model)
    weights = torch.stack([model[i]["attn"]["proj"].weight for i in range(6)])
    assert found.base is not None
    assert found.names == [f"{i}.attn.proj" for i in range(6)]
    assert (found.columns, found.rows) == (stack.columns.tolist(), stack.rows.tolist())
    # The rule is "norm": the chosen features are the largest of all scores, in order.
    assert [found.base.column_scores[j] for j in found.columns] == pytest.approx(found.column_scores)
    assert found.columns == torch.tensor(found.base.column_scores).topk(2).indices.tolist()
    assert found.base.row_scores == pytest.approx(selection.row_scores(weights, stack.columns).tolist())
    assert found.base.base_norms == pytest.approx(weights.norm(dim=(1, 2)).tolist())
    assert found.base.shape == (10, 12)


def test_a_merged_model_tells_the_same() -> None:
    model = adapted()
    randomised(model)
    assert inspect_model(tcur.merge(model)) == inspect_model(tcur.unmerge(model))


@pytest.mark.parametrize("domain", ["fourier", "slice"])
def test_the_file_alone_tells_all_but_the_base(tmp_path: Path, domain: str) -> None:
    model = adapted(domain=domain)
    randomised(model)
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    (of_file,), (of_model,) = inspect_file(read_adapter(path)), inspect_model(model)
    assert of_file.base is None
    assert of_file.core_energy == pytest.approx(of_model.core_energy)
    for name in ("names", "rank", "columns", "rows", "column_scores", "row_scores", "scale", "selection"):
        assert getattr(of_file, name) == getattr(of_model, name)
    assert json.loads(json.dumps(of_model.to_json()))["base"]["shape"] == [10, 12]


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not adapted"):
        inspect_model(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_the_features_of_convolutions_are_named_by_channel_and_tap(kind: type[nn.Conv3d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(kind(5, 4, (2, 1, 3)) for _ in "12"))
    tcur.inject(model, tcur.TCURConfig(rank=(4, 3), scale=1.0, target_modules=["0", "1"]))
    (stack,) = tcur.stacks(model).values()
    (found,) = inspect_model(model)
    assert found.headings == ("input channel", "output channel")
    columns, rows = found.labels
    transposed = kind is nn.ConvTranspose3d
    with_taps, plain = (rows, columns) if transposed else (columns, rows)
    assert plain == [str(index) for index in (found.columns if transposed else found.rows)]
    for order, label in enumerate(with_taps):
        channel, *tap = map(int, re.findall(r"\d+", label))
        assert label == f"{channel}, tap ({','.join(map(str, tap))})"
        expected = model[1].weight[(slice(None), channel, *tap)]
        torch.testing.assert_close(stack.R[1, order] if transposed else stack.C[1, :, order], expected)


def test_a_kernel_of_one_tap_has_channels_alone() -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 1))
    (found,) = inspect_model(tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["0"])))
    assert (found.headings, found.labels[0]) == (("input channel", "output channel"), [str(c) for c in found.columns])
