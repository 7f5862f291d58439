"""Putting a model back, bit for bit, after its weights have trained for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def put_back(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Within this context ``trained`` parameters may change; afterwards, also after an error, all is as it was.

    That is: the values of those parameters and of all buffers, every parameter's gradient and ``requires_grad``, the
    modules' modes, and the states of PyTorch's, NumPy's and Python's random generators.

    Args:
        model: The model.
        trained: Those of its parameters that may change.
    """
    parameters = list(model.parameters())
    values = [(tensor, tensor.detach().clone()) for tensor in (*trained, *model.buffers())]
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, requires_grad, gradient in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
