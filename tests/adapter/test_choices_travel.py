"""Every choice of docs/choosing.md with all that uses an adapter: files, plans, state dicts, merging, inspection."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.files.format import read_adapter
from tcurlora_ext.analysis.inspection import inspect_file, inspect_model
from tcurlora_ext.analysis.plan import plan

CHOICES: dict[str, dict[str, Any]] = {
    "stack_blocks": {"stack_blocks": 1},
    "budget": {"budget": 100},
    "rank_stabilised": {"rank_stabilised": True, "rank": 3},
    "frequencies": {"frequencies": 2},
    "frequencies and more": {"frequencies": 2, "dropout": 0.2, "rank_stabilised": True, "budget": 60},
    "activation": {"selection": "activation"},
    "dropout": {"dropout": 0.3},
    "rank_pattern": {"rank_pattern": {"mlp.linear1": (3, 1), r".*linear2": 4}},
}
NETWORK = Path(__file__).with_name("conftest.py")
# Loads every adapter of a folder onto a base of its own: one new process for all choices.
LOAD = """
import importlib.util, pathlib, sys
import torch, tcurlora_ext as tcur
network, folder = sys.argv[1:]
spec = importlib.util.spec_from_file_location("network", network)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for case in pathlib.Path(folder).iterdir():
    model = module.Network().eval()
    model.load_state_dict(torch.load(case / "base.pt"))
    torch.save(tcur.load_adapter(model, case)(torch.load(case / "x.pt")), case / "y.pt")
"""


@pytest.fixture(params=CHOICES)
def config(request: pytest.FixtureRequest) -> tcur.TCURConfig:
    return tcur.TCURConfig(**{"rank": 2} | CHOICES[request.param])


def inject(model: nn.Module, config: tcur.TCURConfig) -> nn.Module:
    """Inject with calibration inputs where the configuration needs them."""
    if config.selection != "activation":
        return tcur.inject(model, config)
    return tcur.inject(model, config, tcur.calibrate(model, config, [torch.randn(2, 5, 6).exp()]))


@pytest.fixture
def adapted(network: nn.Module, config: tcur.TCURConfig, train: Any) -> Any:
    return train(inject(network, config))


def test_the_configuration_survives_json(config: tcur.TCURConfig) -> None:
    assert tcur.TCURConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.fixture(scope="module")
def elsewhere(make_network: Any, train: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """By choice the output of an adapted network here, and of its file in a new process."""
    folder, outputs = tmp_path_factory.mktemp("elsewhere"), {}
    for name, options in CHOICES.items():
        torch.manual_seed(0)
        network, x, case = make_network(), torch.randn(2, 5, 6), folder / name.replace(" ", "-")
        case.mkdir()
        torch.save(network.state_dict(), case / "base.pt")
        torch.save(x, case / "x.pt")
        train(inject(network, tcur.TCURConfig(**{"rank": 2} | options)))
        tcur.save_adapter(network, case)
        outputs[name] = [network(x)]
    subprocess.run([sys.executable, "-c", LOAD, NETWORK, folder], check=True)
    for name, found in outputs.items():
        found.append(torch.load(folder / name.replace(" ", "-") / "y.pt"))
    return outputs


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_gives_the_same_output_in_a_new_process(choice: str, elsewhere: dict[str, list[Tensor]]) -> None:
    here, there = elsewhere[choice]
    assert torch.equal(there, here)


def test_the_state_loads_into_a_twin(adapted: Any, make_network: Any, config: tcur.TCURConfig, x: Tensor) -> None:
    twin = make_network()
    twin.load_state_dict(adapted.state_dict(), strict=False)
    inject(twin, config)
    result = twin.load_state_dict(adapted.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(twin(x), adapted(x))


def test_a_file_is_taken_over_by_a_twin(adapted: Any, make_network: Any, x: Tensor, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted, tmp_path)
    twin = make_network()
    twin.load_state_dict(adapted.state_dict(), strict=False)
    tcur.load_adapter(twin, path)
    for stack in tcur.stacks(twin).values():
        nn.init.zeros_(stack.core)
    assert torch.equal(tcur.load_adapter(twin, path)(x), adapted(x))


def test_the_plan_counts_what_the_adapter_has(
    make_network: Any, config: tcur.TCURConfig, train: Any, tmp_path: Path
) -> None:
    model = make_network(depth=8)
    expected = plan(model, config, 10)
    summary = tcur.summary(train(inject(model, config)))
    assert expected.tcur.trained == summary.trained
    assert [(s.name, s.slices, s.rank, s.q, s.tcur.trained) for s in expected.stacks] == [
        (s.name, s.slices, s.rank, s.q, s.trained) for s in summary.stacks
    ]
    size = tcur.save_adapter(model, tmp_path).stat().st_size
    assert expected.tcur.file == pytest.approx(size, rel=0.03)


def test_merging_and_back(adapted: Any, x: Tensor) -> None:
    y = adapted(x)
    tcur.merge(adapted)
    assert_close(adapted(x), y, rtol=1e-4, atol=1e-5)
    assert torch.equal(tcur.unmerge(adapted)(x), y)


def test_inspection_of_the_file_and_of_the_model_agree(adapted: Any, tmp_path: Path) -> None:
    of_file = inspect_file(read_adapter(tcur.save_adapter(adapted, tmp_path)))
    for alone, whole in zip(of_file, inspect_model(adapted), strict=True):
        stack = tcur.stacks(adapted)[whole.name]
        assert (alone.rank, alone.rows, alone.columns) == (whole.rank, whole.rows, whole.columns)
        assert (alone.names, alone.scale, alone.selection) == (whole.names, whole.scale, whole.selection)
        assert whole.base is not None
        assert_close(whole.base.delta_norms, stack.delta_weights().flatten(1).norm(dim=1).tolist(), rtol=1e-5, atol=0)
        assert sum(whole.base.delta_energy) == pytest.approx(sum(n**2 for n in whole.base.delta_norms), rel=1e-5)
