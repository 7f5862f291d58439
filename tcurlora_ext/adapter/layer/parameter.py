"""Parameters that are no layer of their own: their weight as a layer, found, adapted and put back in their place.

``nn.MultiheadAttention`` has the weights of its projections as parameters, and transformers 5 has all experts of a
layer in one. The adapted layer is a child of the module, under the parameter's name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import whole

from .linear import TCURLayer

_ORDER = "tcur_parameters"  # of a module: the names of its own parameters before any was taken out


class HeldParameter(nn.Module):
    """A matrix that a module has as a parameter, as a layer without an adapter.

    Args:
        parameter: (out, in).
        slices: How many slices of one shape it is, stacked by rows.

    Attributes:
        weight: The parameter.
        bias: None: a bias stays with the module.
        slices: As given.
    """

    weight: Any  # nn.Parameter
    bias: Any  # None

    def __init__(self, parameter: nn.Parameter, slices: int = 1) -> None:
        super().__init__()
        self.weight, self.slices = parameter, slices
        self.register_parameter("bias", None)

    @property
    def features(self) -> tuple[int, int]:
        """(out, in) of the matrix; of one expert where it has several."""
        return self.weight.shape[0], self.weight.shape[1]

    def slices_of(self, stored: Tensor, slices: int) -> Tensor:
        """A tensor stored like the parameter as slices (slices, out, in), sharing memory.

        Args:
            stored: The tensor.
            slices: How many there are.
        """
        return stored.unflatten(0, (slices, -1))


class TCURParameter(HeldParameter, TCURLayer):
    """A matrix that a module has as a parameter, with a t-CUR adapter. :func:`tcurlora_ext.inject` creates it.

    In a state_dict its weight has the name of the parameter.
    """

    def weight_slices(self) -> Tensor:
        base = self.weight.detach() if self.base is None else self.base
        return self.slices_of(whole(base), self.num_slices)

    def key_of(self, name: str) -> str:
        return name

    def project(self, x: Tensor, bias: Tensor | None, first: int = 0, number: int | None = None) -> Tensor:
        """``x (W + dW)^T + bias`` for some of the slices.

        Args:
            x: (..., in).
            bias: (number*out,) or None.
            first: The first of these slices, among the layer's.
            number: How many there are; None: all from there on.

        Returns:
            (..., number*out).
        """
        self._note_call()
        number = self.num_slices - first if number is None else number
        size = self.weight.shape[0] // self.num_slices
        weight = self.weight[first * size : (first + number) * size]
        if self.merged:
            return nn.functional.linear(x, weight, bias)
        return self.stack.adapt(x, weight, bias, self.first_slice + first, number, self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix.removesuffix(".")] = destination.pop(f"{prefix}weight")


def put_layer(owner: nn.Module, own: str, layer: nn.Module, held: HeldParameter) -> None:
    """Put an adapted layer in the place of a module's parameter.

    Args:
        owner: The module.
        own: The parameter's name in it.
        layer: The layer.
        held: What holds the parameter: the layer itself, or the base layer in it.
    """
    vars(owner).setdefault(_ORDER, tuple(owner._parameters))
    del owner._parameters[own]
    owner._modules[own] = layer
    if layer is held:
        owner._register_load_state_dict_pre_hook(partial(_weight_of_layer, own))


def put_parameter(owner: nn.Module, own: str, plain: HeldParameter) -> None:
    """The inverse of :func:`put_layer`.

    Args:
        owner: The module.
        own: The parameter's name in it.
        plain: The layer without its adapter.
    """
    del owner._modules[own]
    parameters, order = {**owner._parameters, own: plain.weight}, vars(owner)[_ORDER]
    first = {name: parameters.pop(name) for name in order if name in parameters}
    owner._parameters.clear()
    owner._parameters.update(first | parameters)
    if len(first) == len(order):
        del vars(owner)[_ORDER]
    hooks = owner._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        renames = getattr(hook, "hook", hook)
        if isinstance(renames, partial) and renames.func is _weight_of_layer and renames.args == (own,):
            del hooks[key]


def _weight_of_layer(own: str, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a module loads a state: the parameter of this name is the weight of the layer in its place."""
    if prefix + own in state_dict:
        state_dict[f"{prefix}{own}.weight"] = state_dict.pop(prefix + own)
