"""Memory and communication of a rank, against sizes written by hand and the parameters that FSDP2 shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.analysis.plan import plan
from tcurlora_ext.analysis.processes import RankCost, Rates, rank_costs, rank_rows, rank_table, rank_text

WIDTH, DEPTH, RANKS = 32, 3, 4
BLOCK = WIDTH * WIDTH + WIDTH  # parameters
OUTSIDE = 10 * WIDTH


def model() -> nn.Module:
    """Three blocks of one layer each, and outside them an embedding that is tied to the output layer."""
    with torch.device("meta"):
        net = nn.Module()
        net.embed = nn.Embedding(10, WIDTH)
        net.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)}) for _ in range(DEPTH))
        net.output = nn.Linear(WIDTH, 10, bias=False)
        net.output.weight = net.embed.weight
    return net


def costs(ranks: int = RANKS, rates: Rates | None = None, **options: Any) -> dict[tuple[str, str], RankCost]:
    net = model()
    config = tcur.TCURConfig(rank=2, target_modules=["q_proj"])
    found = plan(net, config, 35, lora_rank=4, **options)
    return {(c.method, c.layout): c for c in rank_costs(net, found, ranks, rates, **options)}


def test_ddp_holds_all_and_sends_gradients_alone() -> None:
    found = costs()["tcur", "ddp"]
    assert found.base == 4 * (DEPTH * BLOCK + OUTSIDE)
    assert (found.gathered, found.weights) == (0, 0)
    trained = DEPTH * 2 * 2
    assert found.trained == 16 * trained  # value, gradient and two means, four bytes each
    assert found.gradients == 2 * 4 * trained * 3 // 4  # of an all-reduce in a ring of four
    assert found.factors == 4 * DEPTH * 2 * (WIDTH + WIDTH)


def test_fsdp_spreads_the_base_and_gathers_blocks_twice() -> None:
    found = costs()["tcur", "fsdp"]
    assert found.base == DEPTH * BLOCK + OUTSIDE
    assert found.gathered == 4 * (OUTSIDE + 2 * BLOCK)
    trained = 4 * DEPTH * 2 * 2
    assert found.trained == 4 * trained // RANKS
    assert found.weights == (4 * (2 * DEPTH * BLOCK + OUTSIDE) + trained) * 3 // 4
    assert found.gradients == trained * 3 // 4


def test_lora_factors_are_gathered_with_their_blocks() -> None:
    trained = 4 * DEPTH * 4 * 2 * WIDTH
    found = costs()
    assert found["lora", "fsdp"].weights == (4 * (2 * DEPTH * BLOCK + OUTSIDE) + 2 * trained) * 3 // 4
    assert found["lora", "ddp"].gradients == 2 * trained * 3 // 4
    assert found["lora", "ddp"].factors == 0


def test_a_short_dtype_halves_the_base_but_not_what_trains() -> None:
    wide, short = costs()["tcur", "fsdp"], costs(dtype=torch.bfloat16)["tcur", "fsdp"]
    assert (short.base, short.gathered, short.factors) == (wide.base // 2, wide.gathered // 2, wide.factors // 2)
    assert (short.trained, short.gradients) == (wide.trained, wide.gradients)


def test_one_rank_receives_nothing() -> None:
    for found in costs(ranks=1).values():
        assert (found.weights, found.gradients) == (0, 0)
        assert found.base == 4 * (DEPTH * BLOCK + OUTSIDE)


def test_seconds_are_counts_over_the_given_rates() -> None:
    net, config = model(), tcur.TCURConfig(rank=2, target_modules=["q_proj"])
    found = plan(net, config, 35)
    flops = found.base.forward + found.base.backward + found.tcur.forward + found.tcur.backward
    cost = costs(rates=Rates(1e9, 1e6))["tcur", "fsdp"]
    assert cost.compute_s == pytest.approx(flops / 1e9)
    assert cost.transfer_s == pytest.approx((cost.weights + cost.gradients) / 1e6)
    assert costs()["tcur", "fsdp"].compute_s is None


def test_the_base_at_rest_is_what_the_model_has() -> None:
    net = model()
    assert costs(ranks=1)["lora", "ddp"].base == sum(p.numel() * 4 for p in net.parameters())


def test_text_and_rows() -> None:
    found = list(costs().values())
    header, *lines = rank_table(found)
    assert "compute s" not in header
    assert len(lines) == len(rank_rows(found)) == 4
    assert rank_text(found).splitlines()[1].split()[:3] == ["tcur", "ddp", "4"]
    assert "transfer s" in rank_table(list(costs(rates=Rates(1e9, 1e6)).values()))[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: costs(ranks=0), "ranks is 0, expected a positive whole number"),
        (lambda: Rates(flops=0.0), "flops is 0.0, expected a positive number per second"),
        (lambda: Rates(bytes=float("nan")), "bandwidth is nan, expected a positive number per second"),
    ],
)
def test_wrong_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
