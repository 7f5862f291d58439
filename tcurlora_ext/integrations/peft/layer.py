"""A linear layer or a convolution of a model with the adapters that were added to it through PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded, whole
from tcurlora_ext.adapter.layer.calls import NotesCalls
from tcurlora_ext.adapter.layer.convolution import convolve
from tcurlora_ext.adapter.layer.parameter import HeldParameter
from tcurlora_ext.adapter.layer.quantised import dequantised, rounds_its_input
from tcurlora_ext.adapter.model.support import adapted_type, is_conv1d, matrix_of
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import LayerSlices

BASE = "__base__"  # PEFT's name for "no adapter" in ``adapter_names``


def _features(base: nn.Module) -> tuple[int, int]:
    """The features, or channels, (out, in) of a base layer. PEFT warns of kinds that it does not know itself."""
    if isinstance(base, HeldParameter):
        return base.features
    if isinstance(base, _ConvNd):
        return base.out_channels, base.in_channels
    in_features, out_features = _get_in_out_features(base)
    return out_features, in_features


class TcurLoraLinear(NotesCalls, nn.Module, BaseTunerLayer):
    """A base layer plus the active adapters. :class:`TcurLoraModel` creates it.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, a quantised layer that PEFT can dequantise, or another
            tuner's layer around one of these.
        adapter_name: The first adapter.
        slices: The layer's slices in the stack of this adapter.
        inference_mode: Whether the adapter's core is frozen.
        quantization_backend: PEFT's access to the weight of a quantised layer; None for any other layer.

    Attributes:
        tcurlora_core: Adapter -> its stack. It is not registered as a child: the tuner has registered every stack once.
        slices: Adapter -> the layer's slices in its stack.
    """

    adapter_layer_names = ("tcurlora_core",)
    other_param_names = ("slices",)

    tcurlora_core: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        slices: LayerSlices,
        inference_mode: bool,
        quantization_backend: QuantizationBackend | None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.out_features, self.in_features = _features(self.get_base_layer())
        self.slices: dict[str, LayerSlices] = {}
        object.__setattr__(self, "tcurlora_core", nn.ModuleDict())
        self.register_buffer("unmerged_weight", None, persistent=False)  # W, where the base layer holds W + dW
        self.update_layer(adapter_name, slices, inference_mode)

    unmerged_weight: Tensor | None

    if TYPE_CHECKING:  # what BaseTunerLayer has, which mypy does not see

        def __getattr__(self, name: str) -> Any: ...

    def update_layer(self, adapter_name: str, slices: LayerSlices, inference_mode: bool) -> None:
        """Add an adapter, whose stack is on the device of the base layer.

        Args:
            adapter_name: The adapter.
            slices: The layer's slices in the stack of this adapter.
            inference_mode: Whether the adapter's core is frozen.
        """
        self.slices[adapter_name] = slices
        self.tcurlora_core[adapter_name] = slices.stack
        slices.stack.keeps_columns = True
        slices.stack.layers[slices.first_slice] = self
        slices.stack.ride()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.slices and device is not None and device.type != "meta":
            stack = self.slices[adapter_name].stack
            if not stack.core.is_meta:
                stack.to(device)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the deltas of the active adapters, in the dtype of the base layer's output.

        Args:
            x: (..., in).
            *args: Passed on to the base layer.
            adapter_names: The adapter of every row of a mixed batch, ``"__base__"`` for none.
            **kwargs: Passed on to the base layer.

        Returns:
            (..., out).

        Raises:
            ValueError: The number of names is not the number of rows, or adapters are merged.
        """
        self._note_call()
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        active = [self.slices[name] for name in self.active_adapters if name in self.slices]
        if active and not args and not kwargs and self._can_fuse(x):
            result = self._fused(active.pop(0), x)
        elif active and self._can_carry(active[0]):
            slices = active.pop(0)
            seen = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, slices.stack.row.dtype)
            result = self.base_layer(slices.changed_input(seen, self.training).to(x.dtype), *args, **kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
        for slices in active:
            result = result + self._delta(slices, x, result.dtype)
        return result

    def _fused(self, slices: LayerSlices, x: Tensor) -> Tensor:
        """The base layer's output with the delta of an adapter, in one call of the operator."""
        base = self.get_base_layer()
        return slices.adapt(x, self._as_matrix(base.weight), base.bias, self.training)

    def _is_plain(self, base: nn.Module) -> bool:
        """Whether calling the base layer computes what :meth:`_fused` does, hooks aside."""
        return type(base) is nn.Linear or is_conv1d(base)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether the operator may compute the base product too: calling the base layer would do nothing else."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            self._is_plain(base)
            and not hooked
            and "forward" not in vars(base)
            and type(base.weight) in (nn.Parameter, Tensor)
            and (x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    def _can_carry(self, slices: LayerSlices) -> bool:
        """Whether the base may be called with a changed input in place of adding the delta to its output.

        Not where another tuner's layer is around the base: its adapters have to see x. Not where hooks would see
        another x, the weight trains, or the base rounds its input to int8, which would round a small change away.
        """
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        trains = any(parameter.requires_grad for parameter in base.parameters(recurse=False))
        return slices.rides and not (isinstance(base, BaseTunerLayer) or hooked or trains or rounds_its_input(base))

    def _delta(self, slices: LayerSlices, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The delta of an adapter, in ``dtype``."""
        return slices.delta(self._cast_input_dtype(x, slices.stack.row.dtype), self.training).to(dtype)

    def _check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """One base product for the whole batch, to whose rows every adapter adds its delta."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.slices:
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
                result = result.index_add(0, rows, self._delta(self.slices[adapter], x[rows], result.dtype))
        return result

    # -- weights ------------------------------------------------------------------------------------------------------

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """Convert a weight as stored into a matrix (out, in), or such a matrix into its stored form; shares memory."""
        return matrix_of(self.get_base_layer(), stored)

    def get_base_weight(self) -> Tensor:
        """The base layer's present weight, dequantised."""
        if self.quantization_backend is None:
            return super().get_base_weight()
        return dequantised(self.get_base_layer(), self.quantization_backend)

    def weight_slices(self, adapter_name: str) -> Tensor:
        """The base weight W, also where merged, as slices of an adapter's stack.

        Args:
            adapter_name: The adapter.

        Returns:
            (num_slices, out, in), gathered where it is sharded over processes.
        """
        stored = self.get_base_weight() if self.unmerged_weight is None else self.unmerged_weight
        return self._as_matrix(whole(stored.detach())).unflatten(0, (self.slices[adapter_name].num_slices, -1))

    def slices_in(self, stack: TCURStack) -> int:
        """How many slices of a stack are this layer's.

        Args:
            stack: The stack of one of the layer's adapters.
        """
        adapter = self._adapter_of(stack)
        return 0 if adapter is None else self.slices[adapter].num_slices

    def base_slices(self, stack: TCURStack) -> Tensor:
        """:meth:`weight_slices` of the adapter whose stack asks.

        Args:
            stack: The stack of one of the layer's adapters.
        """
        adapter = self._adapter_of(stack)
        assert adapter is not None
        return self.weight_slices(adapter)

    def _adapter_of(self, stack: TCURStack) -> str | None:
        return next((name for name, slices in self.slices.items() if slices.stack is stack), None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for slices in self.slices.values():
            slices.stack.layers.setdefault(slices.first_slice, self)  # a copied or unpickled stack knows no layers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        new, own = state_dict.get(f"{prefix}base_layer.weight"), getattr(self.base_layer, "weight", None)
        if new is not None and own is not None and not (new.shape == own.shape and torch.equal(new.to(own), own)):
            for slices in self.slices.values():
                slices.stack.hold_columns()  # C stays that of the weights that it was taken from
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """An adapter's dW, in the layout and dtype of the base weight.

        Args:
            adapter_name: The adapter.
        """
        slices = self.slices[adapter_name]
        return self._as_matrix(slices.delta_weight(slices.stack.core.dtype)).to(slices.stack.row.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by W + dW, summed over the adapters in float64 and rounded once.

        W is kept for :meth:`unmerge`. A quantised W is dequantised, and the sum is quantised again.

        Args:
            safe_merge: Check the sum before anything is changed.
            adapter_names: Which adapters; None: the active ones.

        Raises:
            ValueError: The layer is sharded over processes, or with ``safe_merge`` the sum is not finite; nothing is
                changed.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.slices]
        if not new:
            return
        refuse_sharded(self, "save the adapter, load it onto the base in one process and merge there")
        stored = self.get_base_weight() if self.unmerged_weight is None else self.unmerged_weight
        total = self._as_matrix(stored).double()
        for name in [*self.merged_adapters, *new]:
            total = total + self.slices[name].delta_weight(torch.float64)
            if safe_merge and not bool(torch.isfinite(total).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken; nothing was merged"
                )
        self.unmerged_weight = stored
        self.set_base_weight(self._as_matrix(total.to(stored.dtype)).contiguous())
        self.merged_adapters += new

    def unmerge(self) -> None:
        """Restore W, bit for bit. A quantised W is quantised again."""
        if self.unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self.unmerged_weight)
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: dW is added to W and has low rank, so that PEFT can convert it into a LoRA adapter.

        Args:
            adapter_name: The adapter.
        """
        return True

    def __repr__(self) -> str:
        return "tcurlora." + super().__repr__()


class TcurLoraConv(TcurLoraLinear):
    """A convolution plus the active adapters; its weight is a matrix as that of a :class:`tcurlora_ext.TCURConv`."""

    may_ride = False

    def _fused(self, slices: LayerSlices, x: Tensor) -> Tensor:
        return convolve(self.get_base_layer(), slices, x, self.training)

    def _is_plain(self, base: nn.Module) -> bool:
        return adapted_type(base) is not None

    def _delta(self, slices: LayerSlices, x: Tensor, dtype: torch.dtype) -> Tensor:
        seen = self._cast_input_dtype(x, slices.stack.row.dtype)
        return convolve(self.get_base_layer(), slices, seen, self.training, base=False).to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers alone; :func:`tcurlora_ext.to_lora` writes a LoRA of convolutions.

        Args:
            adapter_name: The adapter.
        """
        return False
