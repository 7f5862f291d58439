"""Frozen base layers whose weight is quantised: C and R are taken from the dequantised weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from tcurlora_ext.adapter.model.targets import Target


@dataclass(frozen=True)
class QuantisedTarget(Target):
    """A target whose weight is dequantised each time it is read."""

    backend: QuantizationBackend = None

    @property
    def weight(self) -> Tensor:
        return dequantised(self.module, self.backend).unflatten(0, (self.slices, -1))

    @property
    def shape(self) -> tuple[int, int]:
        in_features, out_features = _get_in_out_features(self.module)
        return out_features // self.slices, in_features


def backend_of(base_layer: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's access to the weight of a quantised layer; None for a layer that is not quantised."""
    # A model quantised by transformers knows how to quantise a merged weight again; one quantised by torchao does not.
    known = {"get_apply_tensor_subclass": _unknown} | get_quantization_kwargs(model)
    return resolve_quantization_backend(base_layer, **known)


def dequantised(base_layer: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight (out, in) as a plain tensor."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # On some CPUs bitsandbytes stores a 4 bit weight in a layout that its dequantisation misreads. Calling
        # state_dict() restores the usual layout.
        base_layer.state_dict()
    return backend.get_base_weight(base_layer).detach()


def rounds_its_input(base_layer: nn.Module) -> bool:
    """Whether the layer rounds its input to int8: bitsandbytes' 8 bit layer, torchao with quantised activations.

    A change of the input below 1/254 of the largest entry of a token would be rounded away, whatever its sum over the
    features gives.
    """
    weight = getattr(base_layer, "weight", None)
    by_torchao = any(getattr(weight, name, None) is not None for name in ("input_quant_func", "act_quant_kwargs"))
    return by_torchao or type(base_layer).__name__ == "Linear8bitLt"


def _unknown() -> Any:
    raise TypeError(
        "cannot merge: how to quantise the merged weight again is unknown, expected a model quantised by transformers"
    )
