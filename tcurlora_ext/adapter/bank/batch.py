"""A batch of several adapters while it runs: the cores as they were when it began, and the layers with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.model.structure import module_of
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.stack import layer_parts
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.operator.backends.native import extension
from tcurlora_ext.operator.bank import TokenPlan, beside, ordinary, riding

from .ids import Owners
from .modules import OwnModules
from .store import Slot, Store


class Gathered(torch.autograd.Function):
    """Cores (D, S, c, r) that were gathered already, of which some are trained: their gradients go to the parameters.

    Nothing is saved, so that several backward passes may go through one such node.
    """

    @staticmethod
    def forward(ctx: Any, gathered: list[Tensor], positions: Sequence[int], *parameters: Tensor) -> Tensor:
        ctx.positions = positions
        return gathered[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        parts = g.unbind(0)
        return None, None, *(parts[position] for position in ctx.positions)


class AdapterBatch:
    """The adapters of one batch (:class:`tcurlora_ext.adapter.stack.batches.Batch`).

    Args:
        stacks: The model's stacks -> their names; one object for all batches of a bank.
        owners: Which adapter has each sample or token.
        store: Where the cores are.
        slots: The slot of each of the batch's D adapters, kept from being written while the batch lives.
        trained: Position among the D adapters -> the parameters of an adapter that trains, by stack, and by their own
            names those beside the cores.
        modules: The modules of which each adapter has its own.

    Attributes:
        marked, stacks: As there.
        used: Whether it has computed a layer.
        called: The names of the modules that it has computed.
    """

    def __init__(
        self,
        stacks: Mapping[TCURStack, str],
        owners: Owners[Any],
        store: Store,
        slots: list[Slot],
        trained: Mapping[int, Mapping[str, nn.Parameter]],
        modules: OwnModules,
    ) -> None:
        self.stacks, self.slots, self._modules = stacks, slots, modules
        self.called: set[str] = set()
        self.marked = self.used = False
        self._owners, self._store, self._trained = owners, store, trained
        self._places = store.places(slots)
        self._together: dict[str, Tensor] | None = None
        self._cores: dict[tuple[TCURStack, bool], tuple[list[int], Tensor]] = {}
        self._own: dict[tuple[str, bool], tuple[list[int], list[Tensor]]] = {}
        self._plans: dict[tuple[torch.Size, torch.device], TokenPlan] = {}

    def adapt(
        self, stack: TCURStack, x: Tensor, weight: Tensor, bias: Tensor | None, first: int, number: int, training: bool
    ) -> Tensor:
        """As :meth:`tcurlora_ext.TCURStack.adapt`, for the batch's adapters."""
        self.used = True
        if training and stack.options.dropout > 0:
            raise ValueError(
                f"{_name(stack, first)}: dropout is {stack.options.dropout}, which is not computed for a batch of "
                "several adapters; adapt the model with dropout=0, or call model.eval()"
            )
        if x.shape[-1:] != weight.shape[1:]:
            raise ValueError(
                f"{_name(stack, first)}: x has shape {tuple(x.shape)}, expected {weight.shape[1]} features"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{_name(stack, first)}: its weight trains, but the adapters of a bank share a frozen base"
            )
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.amp.autocast(device, enabled=False):
                return self._compute(
                    stack, _lowered(x, dtype), _lowered(weight, dtype), bias if bias is None else
                    _lowered(bias, dtype), range(first, first + number),
                )  # fmt: skip
        return self._compute(stack, x, weight, bias, range(first, first + number))

    def _compute(self, stack: TCURStack, x: Tensor, weight: Tensor, bias: Tensor | None, layers: range) -> Tensor:
        plan = self._plan(x, _name(stack, layers.start))
        if not self.slots or x.numel() == 0:
            return nn.functional.linear(x, weight, bias)
        cores = self._cores_of(stack)
        if stack.rides:
            if len(layers) == 1:
                return _ridden(stack, x, weight, bias, cores, layers.start, plan)
            parts = layer_parts(weight, bias, len(layers))
            ridden = [_ridden(stack, x, *part, cores, at, plan) for part, at in zip(parts, layers, strict=True)]
            return torch.cat(ridden, -1)
        calls = _calls(stack, cores, layers, weight.dtype)
        parts = layer_parts(weight, bias, len(calls))
        return _concatenated(ordinary(x, *part, *call, plan) for part, call in zip(parts, calls, strict=True))

    def beside(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What a module of which each adapter has its own makes of x (..., in); None for another module."""
        own = self._modules.get(module)
        if own is None:
            return None
        self.used = True
        self.called.add(own.name)
        plan = self._plan(x, own.name)
        dtype = module.get_parameter("weight").dtype  # the model may have been cast since
        weight, bias = self._modules.base_of(own)
        base = weight.to(dtype), None if bias is None else bias.to(dtype)
        if not self.slots or x.numel() == 0:
            return own.compute(x, *base)
        weights = [value.to(dtype) for value in self._own_of(own.weight)]
        biases = [None] * len(weights) if own.bias is None else [value.to(dtype) for value in self._own_of(own.bias)]
        return beside(x, own.compute, base, list(zip(weights, biases, strict=True)), plan)

    def _own_of(self, name: str) -> list[Tensor]:
        """A parameter beside the cores of each of the batch's adapters.

        Without gradients it is read where it lies, unless its adapter trains. Autograd gets copies, as of the cores:
        what it saves may outlive the batch, where other hooks on saved tensors hide the batch's.
        """
        parameters = {at: trained[name] for at, trained in self._trained.items()}
        versions = [parameter._version for parameter in parameters.values()]
        key = name, torch.is_grad_enabled()
        known = self._own.get(key)
        if known is not None and known[0] == versions:
            return known[1]
        values = self._store.own(name, self.slots)
        with torch.no_grad():
            values = [v.clone() if key[1] or at in parameters else v for at, v in enumerate(values)]
        if key[1]:
            for at, parameter in parameters.items():
                values[at] = Gathered.apply([values[at].unsqueeze(0)], [0], parameter)[0]
        self._own[key] = versions, values
        return values

    def _plan(self, x: Tensor, name: str) -> TokenPlan:
        key = x.shape[:-1], x.device
        plan = self._plans.get(key)
        if plan is None:
            owners, run = self._owners.of_tokens(tuple(key[0]), name)
            plan = self._plans[key] = TokenPlan(owners, run, len(self.slots), x.device)
        return plan

    def _cores_of(self, stack: TCURStack) -> Tensor:
        """The cores of the batch's adapters, (D, S, c, r), gathered once, and again after parameters have changed."""
        name = self.stacks[stack]
        if not self._trained:
            if self._together is None:
                self._together = self._store.gather_all(len(self.slots), self._places)
            return self._together[name]
        parameters = [trained[name] for trained in self._trained.values()]
        versions = [parameter._version for parameter in parameters]
        key = stack, torch.is_grad_enabled()
        known = self._cores.get(key)
        if known is not None and known[0] == versions:
            return known[1]
        cores = self._store.gather(name, len(self.slots), self._places)
        if torch.is_grad_enabled():
            cores = _with_gradients(cores, list(self._trained), parameters)
        self._cores[key] = versions, cores
        return cores


class OwnCores:
    """A batch for which the model's own adapter computes: ``bank.use(None)``."""

    def __init__(self, stacks: Mapping[TCURStack, str]) -> None:
        self.stacks = stacks
        self.marked = self.used = False

    def adapt(self, *_: Any) -> None:
        """None: the stack uses its own core."""
        self.used = True

    def beside(self, *_: Any) -> None:
        """None: the module uses its own parameters."""


def _name(stack: TCURStack, first: int) -> str:
    """The layer, for messages."""
    return module_of(stack.names[first], ())


def _with_gradients(cores: Tensor, positions: list[int], parameters: list[nn.Parameter]) -> Tensor:
    """Gathered cores (D, S, c, r) whose gradients at some positions go to parameters."""
    if extension() is None:
        found: Tensor = Gathered.apply([cores], positions, *parameters)
        return found
    return torch.ops.tcurlora.gathered(cores, positions, parameters)


def _ridden(
    stack: TCURStack, x: Tensor, weight: Tensor, bias: Tensor | None, cores: Tensor, at: int, plan: TokenPlan
) -> Tensor:
    """One slice in the riding form."""
    if stack.options.orthonormal:
        cores = stack.among_columns(cores[:, at], at).unsqueeze(1)
    return riding(x, weight, bias, stack.riding(at, weight.dtype), cores, plan)


def _calls(stack: TCURStack, cores: Tensor, layers: range, dtype: torch.dtype) -> list[tuple[Factors, Tensor]]:
    """What the operator takes for these slices, and the cores of all adapters in each call: (blocks, D, c, r)."""
    along, slices = stack.options.along, stack.slices
    col, row = stack.col.to(dtype), stack.row.to(dtype)
    arguments = slices, layers.start, len(layers), stack.scale
    if along.own_cores(slices):
        calls = along.calls(col, stack.core.detach(), row, *arguments)
        return [(call, cores[None, :, at]) for call, at in zip(calls, layers, strict=True)]
    by_block = cores.transpose(0, 1)
    if stack.options.core_domain == "slice":
        by_block = along.fold(by_block)
    # To the transform they are one core, of D*c columns.
    calls = along.calls(col, by_block.flatten(1, 2), row, *arguments)
    return [(call, call.core.unflatten(1, (len(cores), -1))) for call in calls]


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in autocast's dtype, as nn.Linear casts it: unless it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _concatenated(parts: Any) -> Tensor:
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found, -1)
