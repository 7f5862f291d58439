"""One architecture of another package, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How to build and call a network.

    Attributes:
        name: As its users call it.
        symbol: The class or function that builds it, with its package.
        build: Builds it, tiny.
        inputs: Its keyword arguments; with names "0", "1", ... positional ones.
    """

    name: str
    symbol: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    @property
    def package(self) -> str:
        """The package that it comes from."""
        return self.symbol.partition(".")[0]

    @property
    def missing(self) -> str:
        """What is not installed; "" where all is."""
        if find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        module, _, name = self.symbol.rpartition(".")
        if not hasattr(import_module(module), name):
            return f"{self.package} {version(self.package)} has no {name}"
        return ""

    def network(self) -> nn.Module:
        """The network in eval mode. Its matrices are drawn anew, large enough for every block to affect the output."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.numel():
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        return model

    def output(self, model: nn.Module) -> Tensor:
        """All floating numbers that the network returns for its inputs, in one row."""
        torch.manual_seed(1)
        inputs = self.inputs()
        positional = [value for name, value in inputs.items() if name.isdigit()]
        found = model(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()})
        return torch.cat([tensor.float().flatten() for tensor in tensors(found)])


def tensors(found: Any) -> list[Tensor]:
    """The floating tensors in what a network returns; caches of keys and values are not among them."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, Mapping):
        return [tensor for value in found.values() for tensor in tensors(value)]
    if isinstance(found, (list, tuple)):
        return [tensor for value in found for tensor in tensors(value)]
    return []
