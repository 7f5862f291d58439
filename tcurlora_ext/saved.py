"""What autograd saves for the backward pass, as storages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def owned(module: nn.Module) -> dict[int, int]:
    """Storages of the parameters and buffers of a module: address -> bytes."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@contextmanager
def saved_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Record what forward passes inside the block save for their backward passes.

    Args:
        module: Its parameters and buffers are left out.

    Yields:
        address -> bytes of each storage, filled while the block runs. One that several layers save counts once, in
        full; until the block ends all of them are kept alive.
    """
    parameters = owned(module)
    saved: dict[int, int] = {}
    alive = []  # a freed tensor's address could be given to another

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
