"""Modules put around layers of the base, for methods that PEFT does not have, and how they are put in and merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix

from .base import MethodOptions, beside


class Wrapped(nn.Module):
    """A layer of the base with what a method adds to it.

    Args:
        base_layer: The layer, kept under this name as PEFT does.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def merged(self) -> nn.Module:
        """The layer with the addition folded into its weights. NotImplementedError where no weights express it."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")


class WrappedLinear(Wrapped):
    """A linear layer with a change of its weight: y = base(x) + change(x).

    Args:
        base_layer: The layer.
    """

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer)

    def delta_weight(self) -> Tensor:
        """The change of the weight (out, in)."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer with the weight W + dW."""
        layer = deepcopy(self.base_layer)
        layer.weight += self.delta_weight()
        return layer


class Bottleneck(nn.Module):
    """up(activation(down(x))), with biases; zero at the start, because `up` is.

    `down` has PyTorch's random weights, so that `up` has a gradient in the first step and `down` from the second on.

    Args:
        features: Of input and output.
        width: Of the bottleneck.
        activation: Between the two.
    """

    def __init__(self, features: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.down, self.activation, self.up = nn.Linear(features, width), activation, nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) from (..., features)."""
        out: Tensor = self.up(self.activation(self.down(x)))
        return out


def wrap(
    model: nn.Module, names: Sequence[str], make: Callable[[str, nn.Module], Wrapped], spec: NetworkSpec,
    options: MethodOptions,
) -> None:  # fmt: skip
    """Put modules around layers of a model in place; their own parameters train, and what trains beside an adapter.

    Random weights follow from the options' seed; the global random state of PyTorch is left as it was.

    Args:
        model: The model, all of whose parameters are frozen first.
        names: Of the layers.
        make: What to put around the layer of a name.
        spec: Which parameters are the head and the decoder.
        options: What trains beside, and the seed.

    Raises:
        ValueError: There is no layer to put something around, or `also_train` is unknown.
    """
    prefixes = beside(spec, options)
    if not names:
        raise ValueError(f"{spec.name}: found no layer that this method adapts")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        made = {name: make(name, model.get_submodule(name)) for name in names}
    for name, module in made.items():
        place(model, name, module.to(next(model.parameters()).device))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or has_prefix(name, prefixes))


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def merge(model: nn.Module) -> None:
    """Put the merged layer in the place of every :class:`Wrapped`."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Wrapped)]:
        place(model, name, module.merged())


def linear(name: str, module: nn.Module, rank: int = 1) -> nn.Linear:
    """The module, as a linear layer that has the rank. ValueError with its name where it is none, or too narrow."""
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name}: found a {type(module).__name__}, expected a linear layer")
    if not 0 < rank <= min(module.weight.shape):
        raise ValueError(
            f"{name}: rank is {rank}, expected 1 to {min(module.weight.shape)} for a weight of "
            f"{tuple(module.weight.shape)}"
        )
    return module


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of a matrix, computed in float64.

    A pair of vectors may be negated together without another matrix; here the largest entry of the left one, in
    absolute value, is positive. A core between such vectors, read from a file, thus finds the vectors that it was
    trained between, also where another machine computes the SVD.

    Args:
        matrix: (m, n).
        rank: How many.

    Returns:
        U (m, rank), S (rank,) and V (n, rank) in the dtype of the matrix.
    """
    left, values, right_h = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right_h[:rank].T
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return tuple(part.to(matrix).contiguous() for part in (left * signs, values, right * signs))
