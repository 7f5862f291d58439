"""For all tests of integrations."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imported_is_no_garbage() -> Iterator[None]:
    """accelerate collects garbage before every training: 1 s over all that is imported, and nothing of it is."""
    gc.freeze()
    yield
    gc.unfreeze()
