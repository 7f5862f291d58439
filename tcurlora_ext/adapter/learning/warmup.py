"""Learning factors by a short training of the whole weights, which are put back afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.quantised import is_quantised
from tcurlora_ext.adapter.model.inject import parameters_named
from tcurlora_ext.adapter.model.ranks import stack_ranks
from tcurlora_ext.adapter.model.structure import refuse_adapted
from tcurlora_ext.adapter.model.targets import Target, find_targets, group
from tcurlora_ext.adapter.options import positive
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.maths.coding import BITS, CODED_BITS

from .change import require_learned, subspace_of
from .restoring import put_back

Step = Callable[[nn.Module], Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
# Chosen on the embedded brains and on hippocampus volumes: docs/learned.md.
STEPS, LR, RAMP = 120, 1e-3, 5


@dataclass(frozen=True)
class WarmUp:
    """How the whole weights train: the options of :func:`learn_factors`, where they are described.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = STEPS
    unfreeze: Sequence[str] | str = ()
    unfreeze_lr: float | None = None
    lr: float = LR
    ramp: int = RAMP
    bits: int = CODED_BITS
    optimizer: MakeOptimizer | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "ramp", "parts"):
            positive(name, getattr(self, name))
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, BITS))}")
        for name in ("lr", "unfreeze_lr"):
            rate = getattr(self, name)
            if rate is not None and (isinstance(rate, bool) or not (math.isfinite(rate) and rate > 0)):
                raise ValueError(f"{name} is {rate!r}, expected a number above 0")

    def make_optimizer(self, weights: Sequence[nn.Parameter], beside: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam, or the caller's optimizer, for the layers' weights and what trains beside them."""
        if self.optimizer is not None:
            return self.optimizer([*weights, *beside])
        groups: list[dict[str, Any]] = [{"params": list(weights)}]
        if beside:
            groups.append({"params": list(beside), "lr": self.unfreeze_lr or self.lr})
        return torch.optim.Adam(groups, lr=self.lr)


def learn_factors(
    model: nn.Module,
    config: TCURConfig | None,
    step: Step | Sequence[Step],
    steps: int = STEPS,
    *,
    unfreeze: Sequence[str] | str = (),
    unfreeze_lr: float | None = None,
    lr: float = LR,
    ramp: int = RAMP,
    bits: int = CODED_BITS,
    optimizer: MakeOptimizer | None = None,
    parts: int = 1,
) -> Subspace:
    """Learn the factors of an adapter: train the layers' whole weights for a few steps, and keep the directions.

    The leading singular vectors of each layer's change become C and R. The model is put back bit for bit: its weights,
    buffers, gradients, modes and what is frozen, and the random generators' states; also after an error or Ctrl-C.
    Training whole weights takes their gradients and two moments of Adam, three times their memory: ``optimizer`` and
    ``parts`` save some of it, and :func:`factors_of_change` takes the change of a LoRA instead.

    Args:
        model: A model without adapter, on the task for which the factors are to be learned, or on several.
        config: Of the adapters that will use the factors; ``factors`` has to be ``"learned"`` or ``"learned_rows"``.
            None: ``TCURConfig.preset("learned")``.
        step: Called with the model once a step. It draws a batch and returns the loss, a scalar. Several such functions
            take turns: one subspace for several tasks or sites.
        steps: How many steps.
        unfreeze: Also train these parameters, which will train beside the adapter too, such as a head: prefixes of
            names or regexes, as for :func:`unfreeze`.
        unfreeze_lr: Their learning rate; None: ``lr``. A head should have the one that it will have beside the adapter.
        lr: Learning rate of Adam.
        ramp: Over how many first steps the learning rates rise to theirs.
        bits: Bits in which an entry of the directions is stored: 1 (signs), 2, 4, 8, 16 or 32.
        optimizer: Makes another optimizer for a list of parameters, for example one with 8-bit or factored moments, in
            place of Adam at these learning rates. The ramp applies to it too.
        parts: Train the layers in this many parts, one after another, each from the base weights and for ``steps``
            steps. Gradients and moments take a ``parts``-th of the memory.

    Returns:
        The subspace, for :func:`inject`.

    Raises:
        ValueError: The model is adapted, sharded or quantised; the configuration is for factors of the weights; a
            number is out of range; ``step`` returns no scalar tensor that depends on the weights, or one that is not
            finite; a layer got no gradient; or a layer's change has too low a rank. The model is as it was.
    """
    config = config or TCURConfig.preset("learned")
    warm_up = WarmUp(steps, unfreeze, unfreeze_lr, lr, ramp, bits, optimizer, parts)
    require_learned(config)
    refuse_sharded(model, "call learn_factors before it is sharded")
    refuse_adapted(model)
    return learn_stacks(model, config, group(find_targets(model, config), config), step, warm_up)


def learn_stacks(
    model: nn.Module,
    config: TCURConfig,
    groups: Mapping[str, Sequence[Target]],
    step: Step | Sequence[Step],
    warm_up: WarmUp,
) -> Subspace:
    """As :func:`learn_factors`, for stacks whose targets are known.

    Args:
        model, step: As there.
        config: The configuration, which gives the ranks of these stacks.
        groups: The targets of every stack, by its name.
        warm_up: How the weights train.
    """
    require_learned(config)
    targets = [target for members in groups.values() for target in members]
    quantised = next((target.name for target in targets if is_quantised(target.module)), None)
    if quantised is not None:
        raise ValueError(
            f"{quantised} is quantised, and its weight cannot train: learn the factors on the model before it is "
            "quantised, or from a LoRA by factors_of_change"
        )
    beside = [p for _, p in parameters_named(model, warm_up.unfreeze)] if warm_up.unfreeze else []
    turns = [step] if callable(step) else list(step)
    if not turns:
        raise ValueError("step is an empty list, expected one or more functions")
    if config.budget is None:
        stack_ranks(groups, config)  # a rank that does not fit is an error before the steps are taken
    changes: dict[str, Tensor] = {}
    losses: list[float] = []
    size = -(-len(targets) // warm_up.parts)
    for first in range(0, len(targets), size):
        chosen = targets[first : first + size]
        with put_back(model, [*(target.parameter for target in chosen), *beside]):
            found, values = _train(model, chosen, beside, turns, warm_up)
        changes |= found
        losses += values
    return subspace_of(groups, config, changes, warm_up.bits, about(warm_up, len(turns), losses))


def about(warm_up: WarmUp, tasks: int, losses: Sequence[float]) -> dict[str, Any]:
    """What a subspace's file says of the warm-up that made it."""
    return {
        "learned by": "a warm-up of the whole weights", "steps": warm_up.steps, "learning rate": warm_up.lr,
        "tasks": tasks, "parts": warm_up.parts, "first loss": losses[0], "last loss": losses[-1],
    }  # fmt: skip


def _train(
    model: nn.Module,
    targets: Sequence[Target],
    beside: Sequence[nn.Parameter],
    turns: Sequence[Step],
    warm_up: WarmUp,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the targets' weights; return the change of each, (slices, out, in) in at least float32, and the losses."""
    weights = [target.parameter for target in targets]
    trained = [*weights, *beside]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    # Steps of 1e-3 are lost in bfloat16: shorter dtypes train as float32 copies.
    wide = [p if p.element_size() >= 4 else nn.Parameter(p.detach().float()) for p in trained]
    before = [p.detach().clone() for p in wide[: len(weights)]]
    optimizer = warm_up.make_optimizer(wide[: len(weights)], wide[len(weights) :])
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    reached: set[int] = set()
    for index in range(warm_up.steps):
        for of_optimizer, rate in zip(optimizer.param_groups, rates, strict=True):
            of_optimizer["lr"] = rate * min(1.0, (index + 1) / warm_up.ramp)
        loss = turns[index % len(turns)](model)
        losses.append(_value(loss, index))
        for parameter in (*trained, *wide):
            parameter.grad = None
        loss.backward()
        reached |= {at for at, p in enumerate(weights) if p.grad is not None}
        for parameter, copy in zip(trained, wide, strict=True):
            if copy is not parameter and parameter.grad is not None:
                copy.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(trained, wide, strict=True):
                if copy is not parameter:
                    parameter.copy_(copy)
    missing = [target.name for at, target in enumerate(targets) if at not in reached]
    if missing:
        raise ValueError(
            f"{', '.join(missing[:3])} ({len(missing)} of {len(targets)} layers) got no gradient from step: the loss "
            "does not depend on them; leave them out by exclude_modules"
        )
    pairs = zip(targets, wide, before, strict=False)
    return {target.name: target.as_slices(p.detach() - old).clone() for target, p, old in pairs}, losses


def _value(loss: Any, index: int) -> float:
    """The loss of a step as a number. Raises ValueError where it is no loss."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"step returned {found}, expected the loss, a scalar tensor")
    if loss.grad_fn is None:
        raise ValueError("step returned a loss that does not depend on the model's weights: it has no gradient")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss of step {index} is {value}, expected a finite number; try a lower lr")
    return value
