"""Adapted layers, with a frozen weight and slices of a stack, in the place of ``nn.Linear`` and ``Conv1D``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tcurlora_ext.adapter.distributed.dtensor import whole
from tcurlora_ext.adapter.options import Rank
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import LayerSlices

from .calls import NotesCalls
from .quantised import refuse_quantised
from .uninitialised import refuse_uninitialised


def _own_members(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, with its parameters, buffers and children in dicts of their own."""
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {name: copy.copy(value) if name in own else value for name, value in vars(module).items()}


class TCURLayer(NotesCalls, nn.Module):
    """The base class of adapted layers. Subclasses define how the weight is stored.

    Attributes:
        weight: The frozen weight W of the layer; W + dW where merged.
        bias: The frozen bias (num_slices*out,), or None.
        stack: The :class:`tcurlora_ext.TCURStack` whose slices the layer uses. It is a child module where the layer
            owns it (``from_linear``). Where several layers share it (:func:`tcurlora_ext.inject`), it is a reference
            that is not registered as a child, so that a shared core is registered once.
        first_slice: Index in the stack of the first slice of this layer's weight.
        num_slices: How many slices the weight has, stacked by rows.
        base: W as it was before :meth:`merge`; None where the layer is not merged.
    """

    weight: Any  # nn.Parameter
    bias: Any  # nn.Parameter or None
    stack: TCURStack
    first_slice: int
    num_slices: int
    base: Tensor | None

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Convert a weight as stored into a matrix (num_slices*out, in), or such a matrix into its stored form.

        Args:
            stored: The weight, or the matrix; the result shares its memory.
        """
        return stored

    def weight_slices(self) -> Tensor:
        """The base weight W as slices (num_slices, out, in), also where merged.

        It shares memory with the layer's, unless W is sharded over processes: then it is gathered.
        """
        base = self.weight.detach() if self.base is None else self.base
        return self.as_matrix(whole(base)).unflatten(0, (self.num_slices, -1))

    def key_of(self, name: str) -> str:
        """The name of the layer's weight in a state_dict of a model.

        Args:
            name: The layer's name.
        """
        return f"{name}.weight"

    def slices_in(self, stack: TCURStack) -> int:
        """How many slices of a stack are this layer's.

        Args:
            stack: The layer's stack.
        """
        return self.num_slices

    def base_slices(self, stack: TCURStack) -> Tensor:
        """:meth:`weight_slices`, for the stack that asks.

        Args:
            stack: The layer's stack.
        """
        return self.weight_slices()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(vars(self).get("stack") or self._modules.get("stack"), TCURStack):
            self.stack.layers.setdefault(self.first_slice, self)  # a copied or unpickled stack knows no layers

    @classmethod
    def adopt(cls, plain: nn.Module) -> Self:
        """A layer of this class with the parameters, hooks and attributes of a plain layer.

        Args:
            plain: The plain layer. It is not changed. Its parameters are shared, and so are its hooks: handles of hooks
                that were registered before can still remove them.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(_own_members(plain))
        layer.register_buffer("base", None, persistent=False)
        return layer

    def restore(self, plain_type: type[nn.Module]) -> nn.Module:
        """The inverse of :meth:`adopt`: a plain layer with the present weight.

        Args:
            plain_type: The class of the plain layer.
        """
        plain = plain_type.__new__(plain_type)
        own = ("stack", "first_slice", "num_slices", "plain_weight", "uncalled")
        plain.__dict__.update({k: v for k, v in _own_members(self).items() if k not in own})
        plain._modules.pop("stack", None)
        plain._buffers.pop("base", None)
        plain._non_persistent_buffers_set = plain._non_persistent_buffers_set - {"base"}
        return plain

    def attach(self, stack: TCURStack, first_slice: int, num_slices: int, owned: bool) -> None:
        """Use some slices of a stack, and freeze weight and bias.

        Args:
            stack: The stack.
            first_slice: Index in the stack of the layer's first slice.
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
        stack.layers[first_slice] = self
        stack.ride()

    @property
    def merged(self) -> bool:
        """Whether the weight holds W + dW."""
        return self.base is not None

    def forward(self, x: Tensor) -> Tensor:
        """``x (W + dW)^T + bias``.

        Args:
            x: (..., in) in the weight's dtype, or in any dtype under autocast; any leading shape. It may be empty or
                not contiguous.

        Returns:
            (..., num_slices*out) in the dtype of x, or in autocast's dtype where that is enabled.

        Raises:
            ValueError: The shape, dtype or device of x does not fit. A merged layer raises RuntimeError instead, as
                ``nn.Linear`` does.
            RuntimeError: The backend that was asked for does not work on this device.
        """
        self._note_call()
        weight = self.as_matrix(self.weight)
        if self.base is not None:
            return nn.functional.linear(x, weight, self.bias)
        return self.stack.adapt(x, weight, self.bias, self.first_slice, self.num_slices, self.training)

    def delta_weight(self) -> Tensor:
        """This layer's dense dW, scale included: (num_slices*out, in), in the core's dtype; differentiable."""
        return self.layer_slices.delta_weight()

    @property
    def layer_slices(self) -> LayerSlices:
        """The slices of the stack that belong to this layer."""
        return LayerSlices(self.stack, self.first_slice, self.num_slices)

    @torch.no_grad()
    def summed_weight(self, dtype: torch.dtype) -> Tensor:
        """W + dW, summed in float64 and rounded once: (num_slices*out, in), a new tensor.

        Args:
            dtype: The dtype of the result.
        """
        delta = self.layer_slices.delta_weight(torch.float64)
        return delta.add_(self.weight_slices().flatten(0, 1)).to(dtype)

    def merged_weight(self) -> Tensor:
        """:meth:`summed_weight` in the weight's dtype.

        Raises:
            ValueError: The sum is not finite.
        """
        total = self.summed_weight(self.weight.dtype)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("the merged weight has NaN or infinite values; nothing was merged")
        return total

    def merge(self) -> None:
        """Replace W by W + dW and keep W for :meth:`unmerge`. Without effect on a merged layer.

        Raises:
            ValueError: W + dW is not finite; nothing is changed.
        """
        if not self.merged:
            self.put_merged(self.merged_weight())

    @torch.no_grad()
    def put_merged(self, total: Tensor) -> None:
        """Replace the layer's weight by W + dW.

        Args:
            total: W + dW, the result of :meth:`merged_weight`, (num_slices*out, in).
        """
        # A new parameter: another module may share the old one (an embedding tied to an output layer).
        self.__dict__["plain_weight"] = self.weight
        self.base = self.weight.data
        self.weight = nn.Parameter(self.as_matrix(total).contiguous(), self.weight.requires_grad)

    def unmerge(self) -> None:
        """Restore W, bit for bit. Without effect on a layer that is not merged."""
        if self.base is not None:
            self.weight = self.__dict__.pop("plain_weight")
            self.weight.data = self.base
            self.base = None

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "nn.DataParallel copies a layer, but not the core that it shares with others, to another device; use "
            "DistributedDataParallel (torchrun) or one GPU"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:
            # W and the core define the layer. W + dW and the core would add dW a second time after loading.
            destination[prefix + "weight"] = self.base
            warnings.warn(
                "the model is merged: its state_dict has the base weights W and the cores; call remove(model) to get "
                "or save a plain model with the merged weights",
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.merged and prefix + "weight" in state_dict:
            raise RuntimeError(f"{prefix}weight: this layer is merged; call unmerge() before loading a state")
        new = state_dict.get(prefix + "weight")
        if new is not None:
            same = new.shape == self.weight.shape and torch.equal(new.to(self.weight), self.weight)
            if not same and bool(self.stack.core.any()):
                self.stack.hold_columns()  # a trained core belongs to the weights that it was trained on
            self.stack.reloaded.changed |= not same
            self.stack.reloaded[self.first_slice] = self
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TCURLinear(TCURLayer, nn.Linear):
    """``nn.Linear`` with a t-CUR adapter: ``y = x (W + dW)^T + b``, W and b frozen, the stack's core trained.

    A layer created by this constructor owns a stack of ``slices`` slices. Its state_dict has the keys of ``nn.Linear``
    and ``stack.*``. It can load the state_dict of an ``nn.Linear``: it then chooses rows and columns of those weights.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output, of all slices together.
        bias: Whether the layer adds a bias.
        rank: r, or (c, r).
        slices: S: 1, or the number of row blocks of a fused projection, a divisor of ``out_features``.
        device: The device of all its tensors; not meta.
        dtype: The dtype of weight, bias and factors; the core is at least float32.
        scale: None: unit-norm factors and the default rule; a number: raw factors, and this is the scale.
        **options: The other options of :meth:`TCURStack.from_weights`.

    Raises:
        ValueError: ``slices`` does not divide ``out_features``, or :meth:`TCURStack.from_weights` refuses an argument.
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
            linear: The plain layer; it is not changed, except that its parameters are frozen.
            rank: r, or (c, r).
            slices: S, see :class:`TCURLinear`.
            scale: See :class:`TCURLinear`.
            **options: The other options of :meth:`TCURStack.from_weights`.

        Raises:
            ValueError: The layer is quantised or has no weight yet, ``slices`` does not divide the output features, or
                :meth:`TCURStack.from_weights` refuses an argument, such as a weight that is not finite.
        """
        refuse_quantised("linear", linear)
        refuse_uninitialised(linear, "linear")
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

    :func:`tcurlora_ext.inject` creates it.

    Attributes:
        nx: Input features.
        nf: Output features.
    """

    nx: int
    nf: int

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T
