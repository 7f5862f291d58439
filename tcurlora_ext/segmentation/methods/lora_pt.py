"""LoRA-PT (He et al. 2024, arXiv 2407.11292): the principal part of each stack's tensor SVD trains.

Weights of one shape are the slices of a tensor, as in tCURLoRA, with q, k and v as slices of their own. Its t-SVD gives
the principal part P = U * S * V^T of tubal rank r, whose three factors train as whole tensors; the rest is frozen.

The weights are computed as W + (P - P at the start), which is the frozen rest plus P; in this form the output starts as
that of the base exactly, and the base's weights stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.targets import find_targets, group, placed, stacked_weights
from tcurlora_ext.maths.tproduct import tprod, tsvd, ttranspose
from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task, load_trained, saves_as
from .wrapping import WrappedLinear, linear, wrap
from .wrapping import merge as merge_layers


class PrincipalStack(nn.Module):
    """The principal part of a tensor of S weights (out, in): U (S, out, r), S (S, r, r) and V (S, in, r), which train.

    Args:
        weights: (S, out, in).
        rank: r.
    """

    left_start: Tensor
    middle_start: Tensor
    right_start: Tensor

    def __init__(self, weights: Tensor, rank: int) -> None:
        super().__init__()
        left, middle, right = tsvd(weights.detach().float())
        start = {"left": left[:, :, :rank], "middle": middle[:, :rank, :rank], "right": right[:, :, :rank]}
        for name, factor in start.items():
            self.register_buffer(f"{name}_start", factor.clone())
        self.left, self.middle, self.right = (nn.Parameter(factor.clone()) for factor in start.values())
        self.current: Tensor | None = None
        self._first: Tensor | None = None
        self._known: tuple[object, Tensor] | None = None

    def delta_weights(self) -> Tensor:
        """P minus P at the start, (S, out, in)."""
        if self._first is None or self._first.device != self.left.device:
            # the same operations on the same device as below: the difference is zero before the first step
            with torch.no_grad():
                self._first = _product(self.left_start, self.middle_start, self.right_start)
        return _product(self.left, self.middle, self.right) - self._first

    def now(self) -> Tensor:
        """:meth:`delta_weights`, not computed again without gradients as long as no factor changes."""
        if torch.is_grad_enabled():
            self._known = None
            return self.delta_weights()
        state = (self.left.device, *(factor._version for factor in (self.left, self.middle, self.right)))
        if self._known is None or self._known[0] != state:
            self._known = (state, self.delta_weights())
        return self._known[1]


def _product(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    return tprod(tprod(left, middle), ttranspose(right))


class PrincipalLinear(WrappedLinear):
    """A linear layer whose weight is some slices of a stack: (..., in) to (..., out).

    Args:
        base_layer: The layer.
        stack: The stack.
        first: Its first slice.
        slices: How many; those of a fused projection are blocks of rows.
    """

    def __init__(self, base_layer: nn.Linear, stack: PrincipalStack, first: int, slices: int) -> None:
        super().__init__(base_layer)
        self.stack, self.first, self.slices = stack, first, slices

    def delta_weight(self) -> Tensor:
        """The change of the weight (out, in)."""
        deltas = self.stack.delta_weights() if self.stack.current is None else self.stack.current
        return deltas[self.first : self.first + self.slices].flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output of the layer."""
        weight = self.base_layer.weight + self.delta_weight()
        return nn.functional.linear(x, weight, self.base_layer.bias)


class _Once:
    """Hooks of the whole model, which compute the change of every stack once for a forward pass."""

    def __init__(self, stacks: list[PrincipalStack]) -> None:
        self.stacks = stacks

    def before(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        for stack in self.stacks:
            stack.current = stack.now()

    def after(self, model: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
        for stack in self.stacks:
            stack.current = None


def merge(model: nn.Module) -> None:
    """Put the merged layers in place, and take out what computes the stacks' changes."""
    merge_layers(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Once)]:
            del hooks[key]


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    rank, config = METHOD.option(options, "rank"), TCURConfig()
    stacks: list[PrincipalStack] = []
    places: dict[str, tuple[PrincipalStack, int, int]] = {}
    for name, members in group(find_targets(model, config), config).items():
        if not 0 < rank <= min(members[0].shape):
            raise ValueError(f"stack {name}: rank is {rank}, expected 1 to {min(members[0].shape)}")
        stacks.append(PrincipalStack(stacked_weights(name, members), rank))
        places |= {target.name: (stacks[-1], first, target.slices) for target, first in placed(members)}
    wrap(
        model, list(places), lambda name, layer: PrincipalLinear(linear(name, layer), *places[name]), spec, options
    )  # fmt: skip
    hooks = _Once(stacks)
    model.register_forward_pre_hook(hooks.before)
    model.register_forward_hook(hooks.after)


# Not chosen by measurement: that of full fine-tuning here, as the factors are parts of the weights. The authors'
# released code has 5e-4.
METHOD = Method(
    "lora-pt", "LoRA-PT: principal parts of tensor SVDs", _prepare, 1e-3, saves_as("lora-pt"), load_trained, "#dfc27d",
    adapter=True, options={"rank": 8}, merge=merge,
)  # fmt: skip
