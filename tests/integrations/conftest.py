"""Fixtures for all tests of integrations."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imported_is_no_garbage() -> Iterator[None]:
    """Exclude imported modules from garbage collection, which accelerate runs before every training: it takes 1 s."""
    gc.freeze()
    yield
    gc.unfreeze()
