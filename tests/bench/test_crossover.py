"""Where curves cross: on curves whose crossing is known, and on FLOPs that were counted."""

from __future__ import annotations

import math

import pytest
import torch

from tcurlora_ext.bench.cases import Layer, of_layer
from tcurlora_ext.bench.counts import flops
from tcurlora_ext.bench.names import DENSE, TRANSIENT
from tcurlora_ext.bench.networks import build
from tcurlora_ext.bench.reading.crossover import crossing, crossovers, inference, lines_cross, merge, training
from tcurlora_ext.bench.variants import prepare, variants

from .made_up import row, sweep

POWERS = [64.0, 256.0, 1024.0, 4096.0]


def test_curves_of_powers_cross_where_they_do() -> None:
    """t^1 and 500^0.5 t^0.5: straight lines in logarithms, so the interpolation is exact."""
    assert crossing(POWERS, POWERS, [(500 * t) ** 0.5 for t in POWERS]) == pytest.approx(500)


def test_no_crossing_is_zero_or_infinity() -> None:
    assert crossing(POWERS, [2.0] * 4, [1.0] * 4) == 0
    assert crossing(POWERS, [1.0] * 4, [2.0] * 4) == math.inf
    assert crossing(POWERS, [1.0] * 4, [1.0] * 4) == math.inf


def test_of_several_crossings_the_last_counts() -> None:
    """Close curves may cross several times by noise: above the answer ``dense`` is lower at every point."""
    assert 1024 < crossing(POWERS, [1.0] * 4, [1.1, 0.9, 1.1, 0.5]) < 4096
    assert crossing(POWERS, [1.0] * 4, [0.9, 0.9, 0.9, 1.1]) == math.inf


@pytest.mark.parametrize(
    ("tokens", "times"), [([], []), ([2.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0]), ([1.0], [])]
)
def test_points_that_do_not_rise_are_refused(tokens: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match="expected rising tokens"):
        crossing(tokens, times, times)


def test_lines_cross_also_beyond_the_points() -> None:
    assert lines_cross([1.0, 2.0], [10.0, 20.0], [55.0, 60.0]) == pytest.approx(10)  # 10 t and 50 + 5 t
    assert lines_cross([1.0, 2.0], [10.0, 20.0], [5.0, 10.0]) == 0
    assert lines_cross([1.0, 2.0], [10.0, 20.0], [21.0, 32.0]) == math.inf


def test_closed_forms_of_unetr_layers() -> None:
    assert inference(768, 768) == 384
    assert training(768, 768, 384) == 768  # 2 q n / (4 q - n) with n = 2 q
    assert training(768, 768, 384, transient=True) == 1152
    assert training(768, 3072, 96) == math.inf
    assert training(4096, 4096, 1024) == math.inf  # 4 q = n: never
    assert training(4096, 4096, 1025) == pytest.approx(2 * 1025 * 4096 / 4)


def _flops(name: str, layer: Layer, tokens: int, mode: str) -> int:
    case = of_layer(layer, tokens, rank=4, mode=mode)
    device = torch.device("cpu")
    (variant,) = (v for v in variants(device) if v.name == name)
    return flops(prepare(variant, case, build(case, device)))


@pytest.mark.parametrize("layer", [Layer("single", 48, 80, 1, 12), Layer("fused", 48, 80, 3, 12)], ids=lambda x: x.name)
@pytest.mark.parametrize(("mode", "dense"), [("training", DENSE), ("training", TRANSIENT), ("inference", DENSE)])
def test_the_closed_forms_are_those_of_counted_flops(layer: Layer, mode: str, dense: str) -> None:
    """LoRA of rank q has the operator's products, and the gradient of both factors besides."""
    tokens = [64.0, 128.0]
    q, into, out = 4 * layer.stack, layer.in_features, layer.slices * layer.out_features
    lora = [
        _flops("lora", layer, int(t), mode) - (2 * t * q * (into + out) if mode == "training" else 0) for t in tokens
    ]
    counted = lines_cross(tokens, lora, [_flops(dense, layer, int(t), mode) for t in tokens])
    formula = training(into, out, q, dense == TRANSIENT) if mode == "training" else inference(into, out)
    assert counted == pytest.approx(formula, rel=0.25)  # the middle product is not in the formula
    assert counted >= formula


def test_crossovers_of_a_file() -> None:
    found = {(one.mode, one.dense): one for one in crossovers(sweep())}
    assert set(found) == {("training", DENSE), ("training", TRANSIENT), ("inference", DENSE)}
    one = found["inference", DENSE]
    assert (one.operator, one.lowest, one.highest) == ("tcur native", 100, 1600)
    assert one.measured == pytest.approx(400, rel=0.02)  # interpolated between 300 and 500
    assert one.counted == pytest.approx(300)
    assert one.formula == 384
    assert found["training", DENSE].formula == 768
    assert found["training", TRANSIENT].measured == math.inf
    assert found["training", TRANSIENT].counted == math.inf


def test_other_sweeps_are_no_part_of_it() -> None:
    others = [row("tcur native", 1.0, sweep="rank", rank=4), row(DENSE, 99.0, sweep="rank", rank=4)]
    assert crossovers(sweep() + others) == crossovers(sweep())
    assert crossovers([*others, row("frozen", 1.0)]) == []


def test_merging_pays_after_so_many_tokens_in_all() -> None:
    found = merge(sweep())
    assert (found.operator, found.build_ms, found.token_us) == ("tcur native", pytest.approx(4), pytest.approx(10))
    assert found.measured == pytest.approx(400)
    assert found.formula == 384


def test_a_sweep_without_inference_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 points of frozen and tcur native and tcur dense layer over tokens"):
        merge([one for one in sweep() if one["mode"] == "training"])
