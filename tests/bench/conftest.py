"""Cases small enough for tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tcurlora_ext.bench.cases import Case, Layer, of_layer
from tcurlora_ext.bench.networks import Network, build
from tcurlora_ext.bench.variants import Problem, prepare, variants

CPU = torch.device("cpu")


@pytest.fixture
def layer() -> Layer:
    """A fused layer, 24 -> 3 x 16, three of twelve slices."""
    return Layer("fused", 24, 16, 3, 12)


@pytest.fixture
def case(layer: Layer) -> Case:
    """One training step of it at rank 2 on 32 tokens."""
    return of_layer(layer, 32, rank=2, compiled=False)


@pytest.fixture
def problem(case: Case) -> Callable[..., Problem]:
    """(name of a variant, case, network) -> the problem; without the last two, that of :func:`case`."""

    def prepared(name: str, other: Case = case, network: Network | None = None) -> Problem:
        chosen = next(variant for variant in variants(CPU) if variant.name == name)
        return prepare(chosen, other, network or build(other, CPU))

    return prepared
