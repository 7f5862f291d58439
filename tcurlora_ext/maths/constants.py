"""Constant tensors that are built once and kept, whoever asks for them first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def constant(build: Callable[..., T]) -> Callable[..., T]:
    """Keep what ``build`` made of its arguments, given by position, as ordinary CPU tensors.

    A first call under ``torch.inference_mode`` or a default device would otherwise leave inference or meta tensors for
    every later one. A compiled function builds its own: Dynamo enters neither the cache nor these contexts.

    The cache has room for 1,024 results. There is one table per number of slices, transform, device and dtype, of which
    layers take slices: the largest models need some tens.
    """

    @lru_cache(maxsize=1024)
    def kept(*arguments: Any) -> T:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*arguments)

    @wraps(build)
    def made_once(*arguments: Any) -> T:
        return build(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return made_once
