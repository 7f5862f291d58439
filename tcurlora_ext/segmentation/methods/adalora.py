"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) by PEFT: a rank budget that moves to the layers that need it.

    dW = B diag(E) A,   E zero at the start

Each layer begins with rank 1.5 r; from a tenth of the steps to two thirds of them, entries of E of little importance
become zero, until the layers have rank r on average. A penalty keeps the rows of A and the columns of B near
orthonormal. The importance of each entry is a part of checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.segmentation.networks import NetworkSpec
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.training import add_to_steps

from .base import Method, MethodOptions, Task, load_trained, saves_as
from .by_peft import inject, layers_of, merge

# Of PEFT's rank allocator: what it has measured of each parameter, as tensors by name.
_MEASURED = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """PEFT's rank allocator and penalty as an addition to training steps.

    Args:
        tuner: PEFT's model.
        penalty_weight: Of the penalty.
    """

    def __init__(self, tuner: Any, penalty_weight: float) -> None:
        self.tuner, self.penalty_weight = tuner, penalty_weight

    def penalty(self) -> Tensor:
        """The mean over all A and B of the Frobenius norm of their Gram matrix minus the identity, as in PEFT."""
        parts = []
        for name, factor in self.tuner.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
                parts.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.penalty_weight * torch.stack(parts).mean()

    def after_step(self, step: int) -> None:
        """Measure importance, and set what is beyond the budget to zero."""
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        """What has been measured, and which entries are left."""
        allocator = self.tuner.rankallocator
        return {name: dict(getattr(allocator, name)) for name in _MEASURED} | {"ranks": self._config.rank_pattern}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        device = next(self.tuner.model.parameters()).device
        for name in _MEASURED:
            setattr(self.tuner.rankallocator, name, {key: value.to(device) for key, value in state[name].items()})
        self._config.rank_pattern = state["ranks"]

    @property
    def _config(self) -> Any:
        return self.tuner.peft_config["default"]


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    require_package("peft")
    from peft import AdaLoraConfig

    if task is not None and task.plan.amp == "fp16":
        raise ValueError("adalora: found amp fp16, expected bf16 or off: importance needs gradients without a scale")
    rank, steps = METHOD.option(options, "rank"), 1 if task is None else task.plan.steps
    start = max(rank + 1, round(1.5 * rank))
    config = AdaLoraConfig(
        target_r=rank, init_r=start, lora_alpha=start, tinit=steps // 10, tfinal=steps // 3, total_step=steps,
        target_modules=layers_of(model, spec, options),
    )  # fmt: skip
    tuner = inject(model, spec, options, config)
    if task is not None:
        add_to_steps(model, RankBudget(tuner, METHOD.option(options, "orthogonal")))


# Not chosen by measurement: that of LoRA here. The penalty's weight is PEFT's default.
METHOD = Method(
    "adalora", "AdaLoRA (PEFT)", _prepare, 1e-2, saves_as("adalora"), load_trained, "#ffd92f",
    adapter=True, options={"rank": 8, "orthogonal": 0.5}, merge=merge,
)  # fmt: skip
