"""The experts of a layer in one parameter, with the adapters that were added to it through PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tcurlora_ext.adapter.layer.experts import AsWeights, HeldExperts
from tcurlora_ext.adapter.layer.parameter import put_layer
from tcurlora_ext.adapter.model.targets import Target
from tcurlora_ext.adapter.stack.slices import LayerSlices

from .layer import TcurLoraLinear


class TcurLoraExperts(AsWeights, TcurLoraLinear):
    """A parameter that ``target_parameters`` names, plus the active adapters. :class:`TcurLoraModel` creates it.

    It is in the parameter's place, and its base layer has the parameter. The arguments are those of
    :class:`TcurLoraLinear`.
    """

    @property
    def held(self) -> HeldExperts:
        base = self.get_base_layer()
        assert isinstance(base, HeldExperts)
        return base

    def active_slices(self) -> list[LayerSlices]:
        self._note_call()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        active = [self.slices[name] for name in self.active_adapters if name in self.slices]
        if self.held.weight.requires_grad:
            for slices in active:
                slices.stack.hold_columns()
        return active

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises TypeError: it is used as the parameter, and never called."""
        raise TypeError(f"a {type(self).__name__} is a parameter to the experts' forward pass, and is never called")

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return self.held.as_matrix(stored)


def adapt_parameters(
    model: nn.Module, targets: Iterable[Target], adapter_name: str, slices: Mapping[str, LayerSlices], frozen: bool
) -> None:
    """Add an adapter to parameters with all experts of a layer.

    Args:
        model: The model.
        targets: The parameters.
        adapter_name: The adapter.
        slices: The slices of each target, by its name.
        frozen: Whether the adapter's cores are frozen.
    """
    for target in targets:
        parent, _, own = target.name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = owner._modules.get(own)
        if isinstance(layer, TcurLoraExperts):
            layer.update_layer(adapter_name, slices[target.name], frozen)
            continue
        held = target.module
        assert isinstance(held, HeldExperts)
        put_layer(owner, own, TcurLoraExperts(held, adapter_name, slices[target.name], frozen, None), held)
