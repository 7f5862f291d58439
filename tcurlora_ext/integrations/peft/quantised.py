"""Frozen base layers whose weight is quantised: C and R are taken from the dequantised weight."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from tcurlora_ext.adapter.layer.quantised import dequantised, unknown_subclass
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
    known = {"get_apply_tensor_subclass": unknown_subclass} | get_quantization_kwargs(model)
    return resolve_quantization_backend(base_layer, **known)
