"""The profile of a step: its counts add up to those of the step, and torch.profiler finds every stage."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tcurlora_ext.bench.cases import Case, Layer, of_layer
from tcurlora_ext.bench.counts import fewest_bytes, flops
from tcurlora_ext.bench.devices import Ceilings
from tcurlora_ext.bench.memory import forward_pass
from tcurlora_ext.bench.networks import build
from tcurlora_ext.bench.profile import command
from tcurlora_ext.bench.profile.annotated import STEP, Event, cpu_work, gpu_work
from tcurlora_ext.bench.profile.figure import draw
from tcurlora_ext.bench.profile.measured import OUTSIDE, TOTAL
from tcurlora_ext.bench.profile.stages import LayerCall, count, layer_calls
from tcurlora_ext.bench.variants import Problem, prepare, variants
from tcurlora_ext.maths.flops import CallFlops

CPU = torch.device("cpu")
LIMITS = Ceilings(1e9, 1e9)
FUSED = Layer("fused", 24, 40, 3, 6)  # three slices of a stack of six
WIDE = Layer("wide", 16, 40, 1, 12)  # q = 24 > in, so that h is computed again in backward
FORWARD = ("h = x row^T", "m = h B^T", "y = x W^T + bias", "y += m col^T")
BACKWARD = {
    "tcur eager": ("p = g col", "dcore = diag(p^T h)", "dh = p B", "dx = g W + dh row"),
    "tcur native": ("p = g col", "dh = p B, dcore = diag(p^T h)", "dx = g W + dh row"),
}


def problem_of(case: Case, variant: str) -> Problem:
    """The case adapted by a variant, on the CPU."""
    known = {found.name: found for found in variants(CPU)}
    if variant not in known:
        pytest.skip(f"{variant} does not work here")
    return prepare(known[variant], case, build(case, CPU))


@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("layer", [FUSED, WIDE], ids=lambda layer: layer.name)
def test_the_stages_have_the_flops_of_the_step(variant: str, mode: str, layer: Layer) -> None:
    problem = problem_of(of_layer(layer, 32, rank=2, mode=mode), variant)
    counts = count(layer_calls(problem))
    assert sum(stage.flops for stage in counts.values()) == flops(problem)
    # Stages hand h, m, p and dh over through memory; the step as a whole need not.
    assert sum(stage.fewest_bytes for stage in counts.values()) > fewest_bytes(problem, forward_pass(problem))


def test_h_is_counted_again_where_it_is_not_kept() -> None:
    problem = problem_of(of_layer(WIDE, 32, rank=2), "tcur native")
    assert count(layer_calls(problem))["h = x row^T"].calls == 2


def test_bytes_by_hand() -> None:
    """T = 5, n = 2 slices of S = 3, out = 7, in = 11, c = r = 2, in 16-bit numbers."""
    sizes = CallFlops(T=5, n=2, S=3, out=7, in_=11, c=2, r=2)
    x, y, h, m, weight, col, row, core = 5 * 11, 5 * 14, 5 * 6, 5 * 12, 14 * 11, 7 * 6, 6 * 11, 3 * 2 * 2
    every = ("h = x row^T", "m = h B^T", "y = x W^T + bias", "y += m col^T", "dh = p B, dcore = diag(p^T h)",
             "dx = g W + dh row")  # fmt: skip
    call = LayerCall(sizes, 2, True, every)
    assert call.fewest_bytes("h = x row^T") == 2 * (x + row + h)
    assert call.fewest_bytes("m = h B^T") == 2 * (h + m) + 4 * core
    assert call.fewest_bytes("y = x W^T + bias") == 2 * (x + weight + 14 + y)
    assert call.fewest_bytes("y += m col^T") == 2 * (2 * y + m + col)
    # p and h read once, dh and the core's gradient written.
    assert call.fewest_bytes("dh = p B, dcore = diag(p^T h)") == 2 * (m + h + h) + 4 * 2 * core
    assert replace(call, bias=False).fewest_bytes("y = x W^T + bias") == 2 * (x + weight + y)


def test_what_stays_inside_a_merged_stage_is_not_written() -> None:
    sizes = CallFlops(T=5, n=1, S=3, out=7, in_=11, c=2, r=2)
    merged = "h = x row^T, m = h B^T, y = x W^T + bias + m col^T"
    inference = LayerCall(sizes, 4, False, (merged,))
    ends = 5 * 11 + 6 * 11 + 3 * 2 * 2 + 7 * 11 + 7 * 6 + 5 * 7
    assert inference.fewest_bytes(merged) == 4 * ends
    training = replace(inference, stages=(merged, "p = g col, dh = p B", "dcore = diag(p^T h)", "dx = g W + dh row"))
    assert training.fewest_bytes(merged) == 4 * (ends + 5 * 6)  # h, which dcore reads
    apart = count([inference, replace(inference, stages=("h = x row^T", "m = h B^T", "y = x W^T + bias + m col^T"))])
    assert sum(stage.flops for name, stage in apart.items() if name != merged) == apart[merged].flops


@pytest.mark.parametrize("variant", BACKWARD)
def test_torch_profiler_finds_every_stage(variant: str) -> None:
    problem_of(of_layer(FUSED, 32, rank=2), variant)
    said: list[str] = []
    rows = command.profile(of_layer(FUSED, 32, rank=2), variant, CPU, LIMITS, said.append)
    assert [row["stage"] for row in rows] == [*FORWARD, *BACKWARD[variant], OUTSIDE, TOTAL]
    assert all(row["launches"] > 0 and float(row["time_ms"]) > 0 and row["calls"] == 1 for row in rows[:-2])
    assert rows[-1]["launches"] == sum(row["launches"] for row in rows[:-1])
    assert {row["tool"] for row in rows} == {"torch.profiler"}
    assert all(row["read_mib"] == row["tensor_share"] == "" for row in rows)
    assert [line.split(":")[0] for line in said] == ["ncu", "nsys", "torch.profiler"]


def test_a_network_is_the_sum_of_its_layers() -> None:
    """Two layers of one kind, and a third on half of the tokens whose input requires no gradient."""
    case = of_layer(Layer("single", 24, 24, 1, 3), 32, rank=2)
    problem = problem_of(replace(case, network="stack"), "tcur eager")
    layers = [layer for layer in problem.adapted.modules() if type(layer).__name__ == "TCURLinear"]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.layers[0](inputs[0]), self.layers[1](inputs[1]), self.layers[2](inputs[2][:16].detach())

    problem.adapted = Odd()
    counts = count(layer_calls(problem))
    assert {name: stage.calls for name, stage in counts.items()} == {
        **dict.fromkeys((*FORWARD, "p = g col", "dcore = diag(p^T h)"), 3), "dh = p B": 2, "dx = g W + dh row": 2,
    }  # fmt: skip
    assert counts["y = x W^T + bias"].flops == 2 * 24 * 24 * (32 + 32 + 16)


def test_a_variant_without_stages_is_all_outside() -> None:
    rows = command.profile(of_layer(FUSED, 32, rank=2), "frozen", CPU, LIMITS, lambda _: None)
    assert [row["stage"] for row in rows] == [OUTSIDE, TOTAL]
    assert rows[0]["gflop"] == rows[1]["gflop"] != "0"


def test_work_is_put_into_the_range_that_it_lies_in() -> None:
    first, second = FORWARD[:2]
    ranges = [Event(STEP, 0, 100, True), Event(second, 50, 80, True), Event(first, 10, 30, True),
              Event("not a stage", 85, 95, True)]  # fmt: skip
    work = [Event("a", 12, 20), Event("b", 20, 30), Event("c", 30, 45), Event("d", 55, 60), Event("e", 86, 90)]
    by_hand = [(first, 2, 20), (second, 1, 30), (OUTSIDE, 2, 50)]
    assert [(w.stage, w.launches, round(1e6 * w.seconds)) for w in cpu_work(ranges + work)] == by_hand
    kernels = [(w.stage, round(1e6 * w.seconds)) for w in gpu_work(ranges + work)]
    assert kernels == [(first, 8), (first, 10), (second, 5), (OUTSIDE, 15), (OUTSIDE, 4)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A case that the command finds."""
    case = of_layer(replace(FUSED, name="tiny fused"), 32, rank=2)
    monkeypatch.setattr(command, "every", lambda: iter([case]))
    monkeypatch.setattr(command, "ceilings", lambda *_: LIMITS)
    return case


def test_the_command_writes_a_table_and_a_picture(tiny: Case, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [tiny.name, "--variant", "tcur eager", "--device", "cpu", "--tokens", "16", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (table,) = tmp_path.glob("*/profile-tiny-fused-tcur-eager.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["stage"] for row in rows[-2:]] == [OUTSIDE, TOTAL]
    assert {row["tokens"] for row in rows} == {"16"}
    assert {"device", "torch", "commit", "tool"} <= set(rows[0])
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ncu: not used, cpu is no NVIDIA GPU" in capsys.readouterr().out


def test_bytes_are_drawn_where_they_were_counted(tmp_path: Path) -> None:
    rows = command.profile(of_layer(FUSED, 32, rank=2), "tcur eager", CPU, LIMITS, lambda _: None)
    draw([row | {"read_mib": "2", "written_mib": "1", "tool": "ncu"} for row in rows], tmp_path / "bytes.png")
    draw(rows, tmp_path / "time.png")
    assert (tmp_path / "bytes.png").read_bytes() != (tmp_path / "time.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unetr"], "no case is named 'unetr'; expected one of: tiny fused"),
        (["tiny fused", "--variant", "tcur"], "no variant 'tcur' on cpu; expected one of: frozen; lora; "),
        (["tiny fused", "--rank", "0"], "--rank is 0, expected at least 1"),
        (["tiny fused", "--dtype", "float64"], "--dtype is 'float64', expected one of float32, bfloat16, float16"),
        (["tiny fused", "--mode", "both"], "--mode is 'both', expected one of training, inference"),
        (["tiny fused", "--device", "gpu7"], "--device is 'gpu7', expected cpu, cuda or cuda:N"),
    ],
)
def test_wrong_input_is_one_line(
    tiny: Case, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main(["--device", "cpu", "--output", str(tmp_path), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("USDT")]
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
