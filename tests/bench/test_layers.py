"""The benchmark of layers: it refuses a wrong result, and its rows say what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcurlora_ext.bench import layers
from tcurlora_ext.bench.cases import TINY, UNETR
from tcurlora_ext.bench.variants import Inputs, check, frozen, tcur_of, variants

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_variant_passes_the_check(dtype: torch.dtype) -> None:
    inputs = Inputs.random(TINY, dtype, CPU)
    found = variants(CPU)
    assert {"frozen", "lora", "tcur eager"} <= set(found)
    for name, forward in found.items():
        check(name, forward, inputs)


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: Inputs) -> Tensor:
        return 1.001 * tcur_of("eager")(inputs)

    monkeypatch.setattr(layers, "variants", lambda _: {"frozen": frozen, "lora": frozen, "tcur eager": wrong})
    with pytest.raises(RuntimeError, match=r"tiny, tcur eager: y is off by 1\.0e-03"):
        layers.measure(TINY, torch.float32, CPU, rounds=2)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_detached(inputs: Inputs) -> Tensor:
        y = tcur_of("eager")(inputs)
        return y.detach() + 0.5 * (y - y.detach())

    monkeypatch.setattr(layers, "variants", lambda _: {"frozen": frozen, "lora": frozen, "tcur eager": half_detached})
    with pytest.raises(RuntimeError, match=r"tcur eager: dx is off by 5\.0e-01"):
        layers.measure(TINY, torch.float32, CPU, rounds=2)


def test_rows_say_what_was_measured() -> None:
    rows = layers.measure(TINY, torch.float32, CPU, rounds=5)
    assert [row["variant"] for row in rows] == list(variants(CPU))
    floor = rows[0]
    assert floor["over_frozen"] == "1.000"
    assert floor["extra_over_lora"] == ""
    for row in rows:
        assert (row["case"], row["tokens"], row["width"], row["dtype"]) == ("tiny", 4, 8, "float32")
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    assert {row["variant"] for row in layers.host_times(CPU, rounds=2)} == set(variants(CPU))


def test_the_cases_of_unetr_are_those_of_the_model() -> None:
    """768 -> 768 in a stack of 48, three of whose slices are fused; the MLP's two stacks of 12."""
    assert {(c.in_features, c.out_features, c.slices, c.stack) for c in UNETR} == {
        (768, 768, 3, 48), (768, 768, 1, 48), (768, 3072, 1, 12), (3072, 768, 1, 12)
    }  # fmt: skip
    assert [c.width for c in UNETR] == [384, 384, 96, 96]
