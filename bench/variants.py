"""The variants that are compared: how each adapts a frozen network, and one step of the result."""

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
from .compared_layers import (
    AdapterFirstLoRA,
    ConvolutionLoRA,
    CURLoRA,
    DenseTCUR,
    LoRA,
    StackDelta,
    StackTCUR,
    TransientTCUR,
    randomise,
)
from .names import (
    CURLORA,
    DENSE,
    FROZEN,
    LIGHT_RANKS,
    LORA,
    OWN_CORE,
    PAPER_LORA,
    PAPER_RANK,
    SMALL_LORA,
    STACK,
    TRANSIENT,
    light_variants,
    operator_variants,
)
from .networks import Network

Adapt = Callable[[nn.Module, Network, Case], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way to adapt a network.

    Attributes:
        name: What the results call it.
        family: Variants of a family have the same weights and adapters, so they are checked against one reference.
        adapt: (network's module, network, case) -> the adapted module.
        backend: The backend that runs the operator; "" where the variant is not the operator by a chosen backend.
        compiled: Whether it goes through torch.compile.
        whole: Whether it needs every slice of its stacks to be in the network.
        layers_alone: Whether it is measured only in the training of single layers and stacks.
        by_name: Whether it is measured only in cases that name it, or are ``light``.
    """

    name: str
    family: str
    adapt: Adapt
    backend: str = ""
    compiled: bool = False
    whole: bool = False
    layers_alone: bool = False
    by_name: bool = False

    def fits(self, case: Case, network: Network) -> bool:
        """Whether the case asks for this variant and its network allows it."""
        not_asked = case.variants and self.name not in (FROZEN, LORA, *case.variants)
        left_out = self.by_name and not (case.variants or case.light)
        compiled = self.compiled and not case.compiled
        partial_stack = self.whole and network.repeats > 1
        other = self.layers_alone and (case.mode != "training" or case.network not in ("layer", "stack"))
        return not (not_asked or left_out or compiled or partial_stack or other)


@dataclass
class Problem:
    """The network of a case, adapted by one variant and ready to run; each step takes the next of its inputs.

    Attributes:
        variant: How it was adapted.
        case: What is measured.
        network: The network before it was adapted, with its inputs.
        adapted: The adapted module.
        module: What a step calls: the adapted module, or what torch.compile made of it.
        steps: How many steps were taken.
        optimizer: AdamW, where parameters of the network train beside the adapter.
        trained: The parameters that train.
    """

    variant: Variant
    case: Case
    network: Network
    adapted: nn.Module
    module: Callable[..., Any]
    steps: int = field(default=0, init=False)
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    trained: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.adapted.parameters() if p.requires_grad]
        if self.network.trained:
            # With a learning rate of 0 a step costs the same and the parameters stay those that were checked.
            self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)

    def step(self) -> None:
        """A forward pass; in training also a backward pass and, where there is an optimizer, its step."""
        run = self.network.runs[self.steps % len(self.network.runs)]
        self.steps += 1
        outputs = self.outputs(run.inputs)
        if self.case.mode == "training":
            torch.autograd.backward(outputs, run.gradients, inputs=self.leaves(run.inputs))
            if self.optimizer is not None:
                self.optimizer.step()
            for tensor in self.leaves(run.inputs):
                tensor.grad = None

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of a forward pass, which autograd records in training only."""
        with torch.set_grad_enabled(self.case.mode == "training"):
            found = self.module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def leaves(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The tensors whose gradients a step computes: inputs that require one, then the trained parameters."""
        return [*(x for x in inputs if x.requires_grad), *self.trained]


def prepare(variant: Variant, case: Case, network: Network) -> Problem:
    """Adapt the case's network by a variant; frozen weights are shared with the network, trained ones are copies."""
    # torch.compile caches by code object, which cases share: without a reset the next case would be compiled with
    # dynamic shapes.
    if variant.compiled:
        torch.compiler.reset()
    # An adapter's weights depend on the case alone: variants of a family have the same ones.
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
    """All variants that work on this device with the packages that are installed, the frozen network first."""
    found = [
        Variant(FROZEN, FROZEN, lambda module, network, case: module),
        Variant(LORA, LORA, partial(_wrap, LoRA)),
        Variant("lora adapter first", "lora", partial(_wrap, AdapterFirstLoRA)),
        Variant("lora compiled", "lora", partial(_wrap, LoRA), compiled=True),
        Variant("peft lora", "peft lora", partial(_peft, None)),
        Variant(PAPER_LORA, PAPER_LORA, partial(_peft, PAPER_RANK)),
        *(
            Variant(name, "tcur", partial(_tcur, backend), backend)
            for name, backend in operator_variants().items()
            if not missing(backend, device.type)
        ),
        Variant("tcur compiled", "tcur", partial(_tcur, "auto"), compiled=True),
        Variant(DENSE, "tcur", partial(_dense, DenseTCUR)),
        Variant(TRANSIENT, "tcur", partial(_dense, TransientTCUR), layers_alone=True),
        Variant(STACK, "tcur", _dense_stack, whole=True),
        Variant(CURLORA, "curlora", _curlora),
        Variant(SMALL_LORA, SMALL_LORA, partial(_peft, LIGHT_RANKS[0]), by_name=True),
        *(Variant(name, name, partial(_light, rank), by_name=True) for name, rank in light_variants().items()),
        Variant(OWN_CORE, next(iter(light_variants())), _own_core, by_name=True),
    ]
    return [variant for variant in found if find_spec("peft") or not variant.name.startswith("peft")]


def groups_of(
    module: nn.Module, network: Network, case: Case, backend: str
) -> tuple[tcur.TCURConfig, dict[str, list[Target]]]:
    """The configuration that adapts the network's targets, and the members of each stack by its name."""
    config = tcur.TCURConfig(case.rank, network.targets, split_fused=network.fused, backend=backend)
    return config, group(find_targets(module, config), config)


def _tcur(backend: str, module: nn.Module, network: Network, case: Case) -> nn.Module:
    config, groups = groups_of(module, network, case, backend)
    stacks = {name: _random_stack(members, network.repeats, config) for name, members in groups.items()}
    return attach(module, groups, stacks, config)


def _random_stack(members: Iterable[Target], repeats: int, config: tcur.TCURConfig) -> TCURStack:
    """A stack with as many slices as in the whole model, and a random core by which dW is as large as W.

    Its factors come from random weights: S overlapping windows of one buffer, which takes a 128th of the memory of
    Llama-7B's stack. Time and memory do not depend on the values.
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


def _light(rank: int, module: nn.Module, network: Network, case: Case) -> nn.Module:
    """A core for each layer, with which dW is as large as W; the adapters ride on the base product."""
    tcur.inject(module, tcur.TCURConfig.preset("light", rank=rank, target_modules=network.targets))
    for _, layer in _tcur_layers(module):
        with torch.no_grad():
            layer.stack.core.normal_()
            layer.stack.core.mul_(layer.weight.float().norm() / layer.delta_weight().norm())
    return module


def _own_core(module: nn.Module, network: Network, case: Case) -> nn.Module:
    """As :func:`_light`, in the ordinary form."""
    module = _light(LIGHT_RANKS[0], module, network, case)
    for _, layer in _tcur_layers(module):
        layer.stack.hold_columns()
    return module


def _tcur_layers(module: nn.Module) -> list[tuple[str, TCURLinear]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, TCURLinear)]


def _dense(layer_type: Callable[[TCURLinear], nn.Module], module: nn.Module, network: Network, case: Case) -> nn.Module:
    module = _tcur("auto", module, network, case)
    for name, layer in _tcur_layers(module):
        module.set_submodule(name, layer_type(layer))
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


def _wrap(
    layer_type: Callable[[nn.Linear, int], nn.Module], module: nn.Module, network: Network, case: Case
) -> nn.Module:
    """The network's target layers wrapped by adapted layers of rank q."""
    for name, width in _widths(module, network, case).items():
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Conv3d):
            assert layer_type is LoRA
            module.set_submodule(name, ConvolutionLoRA(layer, width))
            continue
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, layer_type(layer, width))
    return module


def _curlora(module: nn.Module, network: Network, case: Case) -> nn.Module:
    return _wrap(lambda base, _: CURLoRA(base, case.rank), module, network, case)


def _widths(module: nn.Module, network: Network, case: Case) -> dict[str, int]:
    """Layer -> q = r S, the rank of a LoRA whose products have the sizes of tCUR's."""
    groups = groups_of(module, network, case, "auto")[1].values()
    return {t.name: case.rank * network.repeats * sum(m.slices for m in members) for members in groups for t in members}


def _peft(rank: int | None, module: nn.Module, network: Network, case: Case) -> nn.Module:
    """PEFT's LoRA without dropout, of this rank or, for None, of rank q."""
    from peft import LoraConfig, get_peft_model

    ranks = _widths(module, network, case) if rank is None else dict.fromkeys(network.targets, rank)
    config = LoraConfig(r=next(iter(ranks.values())), target_modules=network.targets, rank_pattern=ranks)
    config.alpha_pattern = ranks  # scaling alpha / r = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about networks that are not transformers models
        adapted = get_peft_model(module, config)
    for layer in adapted.modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            randomise(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    return adapted.base_model.model
