"""Constant tensors that are built once and cached."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def constant(build: Callable[..., T]) -> Callable[..., T]:
    """Cache the results of ``build``, which takes positional arguments, as ordinary CPU tensors.

    Otherwise a first call under ``torch.inference_mode`` or under a default device would leave inference tensors or
    meta tensors for every later call. A compiled function builds its constants itself: Dynamo enters neither the cache
    nor these contexts.

    The cache has room for 1,024 results. Layers take slices of one table per number of slices, transform, device and
    dtype: the largest models need some tens of tables.
    """

    @lru_cache(maxsize=1024)
    def kept(*arguments: Any) -> T:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*arguments)

    @wraps(build)
    def made_once(*arguments: Any) -> T:
        return build(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return made_once
