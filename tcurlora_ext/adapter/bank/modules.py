"""Modules of which every adapter of a bank has its own, such as a head: linear layers and LayerNorms.

Their class is another one as long as a bank has them, so that their calls ask for the running batch. A compiled model
notices the class, which a hook would not ensure.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.model.effect import has_changed
from tcurlora_ext.adapter.model.structure import Adapted, stacks
from tcurlora_ext.adapter.model.support import class_of, is_made_anew
from tcurlora_ext.adapter.stack.batches import beside_by_batch
from tcurlora_ext.operator.bank.beside import Compute, Values


class _Banked:
    """What a bank has made of a module. Its copies and pickles are plain modules, which have no bank."""

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in NOTES}
        return copyreg.__newobj__, (PLAIN[type(self)],), state  # type: ignore[attr-defined, index]


class BankedLinear(_Banked, nn.Linear):
    """``nn.Linear`` that a running batch of a bank may compute with each adapter's own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = beside_by_batch(vars(self)["stack_of_bank"], self, input)
        return super().forward(input) if y is None else y


class BankedLayerNorm(_Banked, nn.LayerNorm):
    """``nn.LayerNorm`` that a running batch of a bank may compute with each adapter's own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """x (..., features) -> the same shape."""
        y = beside_by_batch(vars(self)["stack_of_bank"], self, input)
        return super().forward(input) if y is None else y


BANKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: BankedLinear, nn.LayerNorm: BankedLayerNorm}
PLAIN = {banked: plain for plain, banked in BANKED.items()}
# What such a module notes: a stack of its model, by which it finds the running batch, and how many banks it belongs to.
NOTES = ("stack_of_bank", "banks")


@dataclass(frozen=True)
class OwnModule:
    """One of the modules.

    Attributes:
        name: Its name in the model.
        weight, bias: The names of its parameters; None where there is no bias.
        compute: Its function.
    """

    name: str
    weight: str
    bias: str | None
    compute: Compute


class OwnModules:
    """The modules of a model of which the adapters of a bank have their own, and what these are in the base.

    Args:
        adapted: The adapted model.
        names: The modules' names.

    Attributes:
        base: The parameters of the modules as they were when the bank was made, by name: copies, since the model's own
            adapter may train them.

    Raises:
        ValueError: A module cannot be one of them, by name, or holds what the model's own adapter has trained.
    """

    def __init__(self, adapted: Adapted, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise ValueError(f"modules is {names!r}, expected a list of the names of modules")
        self._model = adapted.model
        self._by_module: dict[nn.Module, OwnModule] = {}
        self.base: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            reason = self.reason_against(name)
            if reason:
                raise ValueError(f"{name} cannot be a module of which each adapter has its own: {reason}")
            module = adapted.model.get_submodule(name)
            parameters = {f"{name}.{own}": p for own, p in module.named_parameters(recurse=False)}
            _require_base(adapted, parameters)
            bias = f"{name}.bias" if f"{name}.bias" in parameters else None
            self._by_module[module] = OwnModule(name, f"{name}.weight", bias, _function(module))
            self.base |= {own: p.detach().clone() for own, p in parameters.items()}

    def reason_against(self, name: str) -> str:
        """Why adapters cannot have a module of this name for themselves; "" where they can."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        if name not in modules:
            return f"{type(self._model).__name__} has no module of this name"
        module = modules[name]
        if isinstance(module, TCURLayer):
            return "it is an adapted layer, of which an adapter has the core"
        if type(module) not in BANKED and type(module) not in PLAIN:
            inside = [f"{name}.{own}" for own, m in module.named_modules() if own and type(m) in BANKED]
            advice = f"; name what is in it: {', '.join(inside[:4])}" if inside else ""
            return f"it is a {class_of(module)}, expected nn.Linear or nn.LayerNorm{advice}"
        if is_made_anew(module) or "forward" in vars(module):
            return "its weight is made anew in each call, or its forward was replaced on the instance"
        if isinstance(module, nn.LayerNorm) and (len(module.normalized_shape) != 1 or module.weight is None):
            return "expected a LayerNorm over the last dimension alone, with a weight"
        everywhere = list(self._model.named_parameters(remove_duplicate=False))
        for own, parameter in module.named_parameters(recurse=False):
            other = next((n for n, p in everywhere if p is parameter and n != f"{name}.{own}"), None)
            if other is not None:
                return f"its {own} is also {other} (tied), which all adapters share"
        return ""

    def refuse(self, who: str, names: Iterable[str]) -> None:
        """Raise ValueError for parameters or buffers of an adapter beside its cores that the bank does not keep.

        Args:
            who: The file or adapter, for the message.
            names: What it has beside its cores.
        """
        left = sorted(set(names) - set(self.base))
        if not left:
            return
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in left))
        reasons = {owner: self._reason_for(owner, left) for owner in owners}
        other = next((owner for owner, reason in reasons.items() if reason), None)
        advice = (
            f"AdapterBank(model, modules={[*self.names, *owners]!r}) keeps them per adapter"
            if other is None
            else f"a bank cannot keep {other or 'the model itself'} per adapter: {reasons[other]}"
        )
        raise ValueError(
            f"{who} has {', '.join(left[:4])} ({len(left)} in all) beside the cores: the samples of a batch would "
            f"share them; {advice}"
        )

    def _reason_for(self, owner: str, left: list[str]) -> str:
        reason = self.reason_against(owner) if owner else "its parameters belong to no module in it"
        if reason or owner not in self.names:
            return reason
        return f"{', '.join(n for n in left if n.rpartition('.')[0] == owner)} is no parameter of it"

    @property
    def names(self) -> list[str]:
        """The modules' names."""
        return [own.name for own in self._by_module.values()]

    @property
    def nbytes(self) -> int:
        """The bytes of the base's parameters."""
        return sum(value.nbytes for value in self.base.values())

    def get(self, module: nn.Module) -> OwnModule | None:
        """What is known of a module; None where it is not one of them, such as one of a copy of the model."""
        return self._by_module.get(module)

    def base_of(self, own: OwnModule) -> Values:
        """The weight and bias of the base."""
        return self.base[own.weight], None if own.bias is None else self.base[own.bias]

    def of(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The present parameters of a model that has modules of these names."""
        here = dict(model.named_parameters(remove_duplicate=False))
        return {name: here[name].detach() for name in self.base if name in here}

    def require(self) -> None:
        """Raise ValueError where a module is not in the model any more."""
        for module, own in self._by_module.items():
            try:
                same = self._model.get_submodule(own.name) is module
            except AttributeError:
                same = False
            if not same:
                raise ValueError(f"{own.name} is not the module that it was when the bank was made: it was replaced")

    def answer_to(self, bank: Any) -> None:
        """Let the modules ask for the running batch, until the bank is gone."""
        for module in self._by_module:
            state = vars(module)
            state["stack_of_bank"] = next(iter(stacks(self._model).values()))
            state["banks"] = state.get("banks", 0) + 1
            module.__class__ = BANKED.get(type(module), type(module))
            weakref.finalize(bank, _let_go, weakref.ref(module)).atexit = False


def _let_go(reference: weakref.ref[nn.Module]) -> None:
    module = reference()
    if module is None:
        return
    state = vars(module)
    state["banks"] -= 1
    if state["banks"] == 0:
        module.__class__ = PLAIN[type(module)]
        for note in NOTES:
            del state[note]


def _function(module: nn.Module) -> Compute:
    if isinstance(module, nn.LayerNorm):
        return partial(_layer_norm, module.normalized_shape, module.eps)
    return nn.functional.linear


def _layer_norm(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.layer_norm(x, shape, weight, bias, eps)


def _require_base(adapted: Adapted, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError where the parameters are not the base's any more, but those of the model's own adapter."""
    container = adapted.container
    for name, parameter in parameters.items():
        before = container.unfrozen.get(name)
        if name in container.loaded or (before is not None and has_changed(before, parameter)):
            raise ValueError(
                f"{name} was trained with the model's own adapter, or loaded with it, and the base's is gone: make the "
                "bank with a model that has just been adapted, and load the adapter into the bank"
            )
