"""The base that is adapted, and its input, in float64: two ways to compute one output differ by rounding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..conftest import Network


@pytest.fixture
def base() -> Network:
    return Network().double().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64)
