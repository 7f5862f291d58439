"""The forms that are compared: how each adapts a plain frozen network, and one step of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLinear
from tcurlora_ext.adapter.model.inject import attach
from tcurlora_ext.adapter.model.targets import Target, find_targets, group
from tcurlora_ext.adapter.options import GIVEN, StackOptions
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths.selection import Selection
from tcurlora_ext.operator.backends import missing

from .cases import Case
from .forms import AdapterFirstLoRA, CURLoRA, DenseTCUR, PlainLoRA, StackDelta, StackTCUR, TransientTCUR, randomise
from .networks import Network

Adapt = Callable[[nn.Module, Network, Case], nn.Module]
FLOOR, LORA = "frozen", "lora"
PAPER_RANK = 32  # of the LoRA that the paper compares with


@dataclass(frozen=True)
class Variant:
    """One form. Variants of a ``family`` hold the same numbers, so they share one reference.

    compiled    goes through torch.compile
    whole       needs every slice of its stack to be in the network
    transient   whether it differs from another form in the training of layers alone
    """

    name: str
    family: str
    adapt: Adapt
    compiled: bool = False
    whole: bool = False
    transient: bool = False

    def fits(self, case: Case, network: Network) -> bool:
        """Whether there is such a form of this case, and the case wants it."""
        unwanted = case.forms and self.name not in (FLOOR, LORA, *case.forms)
        compiled = self.compiled and not case.compiled
        partial_stack = self.whole and network.repeats > 1
        other = self.transient and (case.mode != "training" or case.network not in ("layer", "stack"))
        return not (unwanted or compiled or partial_stack or other)


@dataclass
class Problem:
    """A network in one form, ready to run; ``step`` takes the next of the network's inputs."""

    variant: Variant
    case: Case
    network: Network
    plain: nn.Module  # the adapted module
    module: Callable[..., Any]  # the same, or what torch.compile makes of it
    steps: int = field(default=0, init=False)
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    trained: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.plain.parameters() if p.requires_grad]
        if self.network.trained:
            # Rate 0: every step costs what a step costs and finds the numbers it was checked with.
            self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)

    def step(self) -> None:
        """A forward pass; in training also the gradients of the inputs and of what trains, and the optimizer's step."""
        run = self.network.runs[self.steps % len(self.network.runs)]
        self.steps += 1
        outputs = self.outputs(run.inputs)
        if self.case.mode == "training":
            torch.autograd.backward(outputs, run.gradients, inputs=self.wanted(run.inputs))
            if self.optimizer is not None:
                self.optimizer.step()
            for tensor in self.wanted(run.inputs):
                tensor.grad = None

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pass, with gradients in training alone."""
        with torch.set_grad_enabled(self.case.mode == "training"):
            found = self.module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def wanted(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """What a step computes gradients of."""
        return [*(x for x in inputs if x.requires_grad), *self.trained]


def prepare(variant: Variant, case: Case, network: Network) -> Problem:
    """The case's network in this form; the frozen weights are shared, what trains is its own."""
    # torch.compile keeps what it compiled for a code object; cases share those, so a later one would be recompiled
    # with dynamic shapes.
    if variant.compiled:
        torch.compiler.reset()
    # The numbers of an adapter depend on nothing but the case: variants of a family have the same ones.
    torch.manual_seed(1)
    shared = {id(p): p for p in network.module.parameters()}
    module = variant.adapt(copy.deepcopy(network.module, shared), network, case)
    for name, parameter in list(module.named_parameters()):
        if network.trained and name.startswith(network.trained):
            _set_parameter(module, name, nn.Parameter(parameter.detach().clone()))
    module.train(case.mode == "training")
    return Problem(variant, case, network, module, torch.compile(module) if variant.compiled else module)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, parameter)


def variants(device: torch.device) -> list[Variant]:
    """All forms that work on this device with the packages that are there, the floor first."""
    backends = [name for name in tcur.backends() if not missing(name, device.type)]
    found = [
        Variant(FLOOR, FLOOR, lambda module, network, case: module),
        Variant(LORA, LORA, partial(_wrap, PlainLoRA)),
        Variant("lora adapter first", "lora", partial(_wrap, AdapterFirstLoRA)),
        Variant("lora compiled", "lora", partial(_wrap, PlainLoRA), compiled=True),
        Variant("peft lora", "peft lora", partial(_peft, None)),
        Variant(f"peft lora r={PAPER_RANK}", f"peft lora r={PAPER_RANK}", partial(_peft, PAPER_RANK)),
        *(Variant(f"tcur {name}", "tcur", partial(_tcur, name)) for name in backends),
        Variant("tcur compiled", "tcur", partial(_tcur, "auto"), compiled=True),
        Variant("tcur dense layer", "tcur", partial(_dense, DenseTCUR)),
        Variant("tcur transient", "tcur", partial(_dense, TransientTCUR), transient=True),
        Variant("tcur dense stack", "tcur", _dense_stack, whole=True),
        Variant("curlora dense", "curlora", _curlora),
    ]
    return [variant for variant in found if find_spec("peft") or not variant.name.startswith("peft")]


def groups_of(
    module: nn.Module, network: Network, case: Case, backend: str
) -> tuple[tcur.TCURConfig, dict[str, list[Target]]]:
    """The configuration that adapts the network's targets, and its stacks' members."""
    config = tcur.TCURConfig(case.rank, network.targets, split_fused=network.fused, backend=backend)
    return config, group(find_targets(module, config), config)


def _tcur(backend: str, module: nn.Module, network: Network, case: Case) -> nn.Module:
    config, groups = groups_of(module, network, case, backend)
    stacks = {name: _random_stack(members, network.repeats, config) for name, members in groups.items()}
    return attach(module, groups, stacks, config)


def _random_stack(members: Iterable[Target], repeats: int, config: tcur.TCURConfig) -> TCURStack:
    """A stack as tall as in the whole model, whose core makes dW as large as W.

    Its factors come from random weights: S overlapping windows of one buffer, which takes a 128th of the memory of
    Llama-7B's stack. What is measured does not depend on where the numbers come from.
    """
    members = list(members)
    weight = members[0].weight
    _, out_features, in_features = weight.shape
    slices, rank = repeats * sum(target.slices for target in members), config.rank
    assert isinstance(rank, int)
    buffer = torch.rand(out_features * in_features + 997 * slices, device=weight.device).sub_(0.5)
    windows = buffer.to(weight.dtype).as_strided((slices, out_features, in_features), (997, in_features, 1))
    rows, columns = (torch.randperm(size, device=weight.device)[:rank] for size in (out_features, in_features))
    chosen = Selection(rows, columns, torch.ones(rank), torch.ones(rank))
    names = [f"slice {index}" for index in range(slices)]
    stack = TCURStack(windows, chosen, StackOptions(rank, selection=GIVEN, backend=config.backend), names)
    with torch.no_grad():
        stack.core.normal_()
        stack.core.mul_(weight[0].float().norm() / stack.delta_weights(range(1)).norm())
    return stack


def _tcur_layers(module: nn.Module) -> list[tuple[str, TCURLinear]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, TCURLinear)]


def _dense(form: Callable[[TCURLinear], nn.Module], module: nn.Module, network: Network, case: Case) -> nn.Module:
    module = _tcur("auto", module, network, case)
    for name, layer in _tcur_layers(module):
        module.set_submodule(name, form(layer))
    return module


def _dense_stack(module: nn.Module, network: Network, case: Case) -> nn.Module:
    module = _tcur("auto", module, network, case)
    shared: dict[int, StackDelta] = {}
    for name, layer in _tcur_layers(module):
        delta = shared.setdefault(id(layer.stack), StackDelta(layer))
        module.set_submodule(name, StackTCUR(layer, delta))
    for delta in shared.values():
        module.register_forward_hook(delta.drop)
    return module


def _wrap(form: Callable[[nn.Linear, int], nn.Module], module: nn.Module, network: Network, case: Case) -> nn.Module:
    """Plain layers wrapped by a form of rank q."""
    for name, width in _widths(module, network, case).items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, form(layer, width))
    return module


def _curlora(module: nn.Module, network: Network, case: Case) -> nn.Module:
    return _wrap(lambda base, _: CURLoRA(base, case.rank), module, network, case)


def _widths(module: nn.Module, network: Network, case: Case) -> dict[str, int]:
    """Layer -> q, the rank of the LoRA whose products are as wide as tCUR's."""
    groups = groups_of(module, network, case, "auto")[1].values()
    return {t.name: case.rank * network.repeats * sum(m.slices for m in members) for members in groups for t in members}


def _peft(rank: int | None, module: nn.Module, network: Network, case: Case) -> nn.Module:
    """PEFT's LoRA as a user gets it, of one rank or of rank q, without dropout."""
    from peft import LoraConfig, get_peft_model

    ranks = _widths(module, network, case) if rank is None else dict.fromkeys(network.targets, rank)
    config = LoraConfig(r=next(iter(ranks.values())), target_modules=network.targets, rank_pattern=ranks)
    config.alpha_pattern = ranks  # scaling alpha / r = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of networks that are no transformers models
        adapted = get_peft_model(module, config)
    for layer in adapted.modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            randomise(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    return adapted.base_model.model
