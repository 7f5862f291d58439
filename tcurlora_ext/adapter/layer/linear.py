"""Layers that hold a frozen weight and use a stack: drop-in forms of ``nn.Linear`` and of transformers' ``Conv1D``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tcurlora_ext.adapter.distributed.dtensor import whole
from tcurlora_ext.adapter.options import Rank
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import LayerSlices

from .quantised import refuse_quantised


class TCURLayer(nn.Module):
    """What every adapted layer has. Subclasses say how their weight lies in memory.

    Attributes:
        weight: The frozen W of the layer, W + dW where merged.
        bias: The frozen bias (num_slices*out,), or None.
        stack: The :class:`tcurlora_ext.TCURStack` it uses: a child module where the layer owns it (``from_linear``), a
            plain reference where layers share it (:func:`tcurlora_ext.inject`), so that a shared core is registered
            once.
        first_slice: Index in the stack of the first slice of this layer's weight.
        num_slices: How many slices the weight has, stacked by rows.
        base: W as it was before :meth:`merge`; None where the layer is not merged.
    """

    weight: Any  # nn.Parameter
    bias: Any  # nn.Parameter or None
    stack: TCURStack
    first_slice: int
    num_slices: int
    base: Tensor | None  # the weight as it was before merge(); None where the layer is not merged

    def as_matrix(self, stored: Tensor) -> Tensor:
        """A weight as the layer stores it -> (num_slices*out, in), and the other way round; shares memory.

        Args:
            stored: The weight, or the matrix.
        """
        return stored

    def weight_slices(self) -> Tensor:
        """The base weight, also where merged, as slices (num_slices, out, in), sharing memory; gathered if sharded."""
        base = self.weight.detach() if self.base is None else self.base
        return self.as_matrix(whole(base)).unflatten(0, (self.num_slices, -1))

    @classmethod
    def adopt(cls, plain: nn.Module) -> Self:
        """A layer of this class with the parameters, hooks and attributes of a plain one.

        Args:
            plain: The plain layer, which is left as it is and shares its parameters.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in plain.__dict__.items()})
        layer.register_buffer("base", None, persistent=False)
        return layer

    def restore(self, plain_type: type[nn.Module]) -> nn.Module:
        """The inverse of :meth:`adopt`: a plain layer with the weight as it is now.

        Args:
            plain_type: Its class.
        """
        plain = plain_type.__new__(plain_type)
        own = ("stack", "first_slice", "num_slices", "plain_weight")
        plain.__dict__.update(
            {k: copy.copy(v) if isinstance(v, dict) else v for k, v in self.__dict__.items() if k not in own}
        )
        plain._modules.pop("stack", None)
        plain._buffers.pop("base", None)
        plain._non_persistent_buffers_set = plain._non_persistent_buffers_set - {"base"}
        return plain

    def attach(self, stack: TCURStack, first_slice: int, num_slices: int, owned: bool) -> None:
        """Use some slices of a stack; the base weight and bias are frozen.

        Args:
            stack: The stack.
            first_slice: Index of the layer's first slice in it.
            num_slices: How many slices the layer's weight has.
            owned: Whether the stack becomes a child module of this layer.
        """
        if owned:
            self.stack = stack
        else:
            object.__setattr__(self, "stack", stack)
        self.first_slice, self.num_slices = first_slice, num_slices
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def merged(self) -> bool:
        """Whether the weight holds W + dW."""
        return self.base is not None

    def forward(self, x: Tensor) -> Tensor:
        """``x (W + dW)^T + bias``.

        Args:
            x: (..., in) of the weight's dtype, or of any under autocast; any leading shape, also empty or not
                contiguous.

        Returns:
            (..., num_slices*out) in the dtype of x; under autocast in its dtype.

        Raises:
            ValueError: The shape, dtype or device of x does not fit (RuntimeError where merged, as ``nn.Linear``).
            RuntimeError: The backend that was asked for does not work on this device.
        """
        weight = self.as_matrix(self.weight)
        if self.base is not None:
            return nn.functional.linear(x, weight, self.bias)
        return self.stack.adapt(x, weight, self.bias, self.first_slice, self.num_slices, self.training)

    def delta_weight(self) -> Tensor:
        """This layer's dW, dense, scale included: (num_slices*out, in) in the core's dtype, differentiable."""
        return self.layer_slices.delta_weight()

    @property
    def layer_slices(self) -> LayerSlices:
        """Which slices of the stack are this layer's."""
        return LayerSlices(self.stack, self.first_slice, self.num_slices)

    @torch.no_grad()
    def summed_weight(self, dtype: torch.dtype) -> Tensor:
        """W + dW, summed in float64 and rounded once: (num_slices*out, in), a new tensor.

        Args:
            dtype: Of the result.
        """
        delta = self.layer_slices.delta_weight(torch.float64)
        return delta.add_(self.weight_slices().flatten(0, 1)).to(dtype)

    def merged_weight(self) -> Tensor:
        """:meth:`summed_weight` in the weight's dtype.

        Raises:
            ValueError: It is not finite.
        """
        total = self.summed_weight(self.weight.dtype)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("the merged weight has NaN or infinite values; nothing was merged")
        return total

    def merge(self) -> None:
        """Put W + dW in the place of W and keep W for :meth:`unmerge`. Without effect where merged.

        Raises:
            ValueError: W + dW is not finite; nothing is changed.
        """
        if not self.merged:
            self.put_merged(self.merged_weight())

    @torch.no_grad()
    def put_merged(self, total: Tensor) -> None:
        """Make a weight of :meth:`merged_weight` the layer's.

        Args:
            total: (num_slices*out, in).
        """
        # A parameter of its own: another module may share this one (an embedding tied to an output layer).
        self.__dict__["plain_weight"] = self.weight
        self.base = self.weight.data
        self.weight = nn.Parameter(self.as_matrix(total).contiguous(), self.weight.requires_grad)

    def unmerge(self) -> None:
        """Put W back, bit for bit. Without effect where not merged."""
        if self.base is not None:
            self.weight = self.__dict__.pop("plain_weight")
            self.weight.data = self.base
            self.base = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:
            # W and the core say all; W + dW and the core would count the change twice when loaded.
            destination[prefix + "weight"] = self.base

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.merged and prefix + "weight" in state_dict:
            raise RuntimeError(f"{prefix}weight: this layer is merged; call unmerge() before loading a state")
        new = state_dict.get(prefix + "weight")
        if new is not None:
            same = new.shape == self.weight.shape and torch.equal(new.to(self.weight), self.weight)
            self.stack.reloaded.changed |= not same
            self.stack.reloaded[self.first_slice] = self
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TCURLinear(TCURLayer, nn.Linear):
    """``nn.Linear`` with a t-CUR adapter: ``y = x (W + dW)^T + b``, W and b frozen, the stack's core trained.

    As a layer of its own it has a stack of ``slices`` slices. Its keys are those of ``nn.Linear`` and ``stack.*``; a
    plain Linear's state_dict loads into it, and rows and columns are then chosen from those weights.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output, of all slices together.
        bias: Whether it adds a bias.
        rank: r, or (c, r).
        slices: S: 1, or the number of row blocks of a fused projection, a divisor of ``out_features``.
        device: Of all its tensors; not meta.
        dtype: Of weight, bias and factors; the core is at least float32.
        scale: None: unit-norm factors and the default rule; a number: raw factors times it.
        **options: The others of :meth:`TCURStack.from_weights`.

    Raises:
        ValueError: ``slices`` does not divide ``out_features``, or what :meth:`TCURStack.from_weights` refuses.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: Rank = 8,
        slices: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.register_buffer("base", None, persistent=False)
        self._own_stack(rank, slices, scale, options)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: Rank = 8, slices: int = 1, *, scale: float | None = None, **options: Any
    ) -> TCURLinear:
        """An adapted layer that shares a plain layer's parameters and freezes them.

        Args:
            linear: The plain layer; it stays as it is, but for its frozen parameters.
            rank: r, or (c, r).
            slices: S, as for the class.
            scale: As for the class.
            **options: The others of :meth:`TCURStack.from_weights`.

        Raises:
            ValueError: ``slices`` does not divide the output features, or what :meth:`TCURStack.from_weights` refuses,
                such as a weight that is not finite; a quantised layer.
        """
        refuse_quantised("linear", linear)
        layer = cls.adopt(linear)
        layer._own_stack(rank, slices, scale, options)
        return layer

    def _own_stack(self, rank: Rank, slices: int, scale: float | None, options: dict[str, Any]) -> None:
        if slices < 1 or self.out_features % slices:
            raise ValueError(f"slices is {slices}, expected a divisor of the {self.out_features} output features")
        weights = self.weight.detach().unflatten(0, (slices, -1))
        stack = TCURStack.from_weights(weights, rank, scale=scale, **options)
        self.attach(stack, 0, slices, owned=True)


class TCURConv1D(TCURLayer):
    """transformers' ``Conv1D`` (GPT-2) with a t-CUR adapter: a linear layer whose weight is stored as (in, out).

    :func:`tcurlora_ext.inject` makes it.

    Attributes:
        nx: Input features.
        nf: Output features.
    """

    nx: int
    nf: int

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T
