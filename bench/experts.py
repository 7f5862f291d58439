"""The CPU time of a training step of a layer of experts: frozen, adapted, and with PEFT's LoRA in the same parameters.

    python -m tcurlora_ext.bench.experts

LoRA with ``target_parameters`` adds a dense change to the weights of all experts in every call.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.table import text_table

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def layer_of_experts(experts: int, hidden: int, intermediate: int, implementation: str) -> nn.Module:
    """Mixtral's layer of experts with two experts for a token, and its router.

    Args:
        experts: The number of experts.
        hidden: The width of the tokens.
        intermediate: The width between the experts' two products.
        implementation: That of transformers, one of ``IMPLEMENTATIONS``.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return nn.ModuleDict({"mlp": block}).requires_grad_(False)


def variants(plain: nn.Module, rank: int) -> Iterator[tuple[str, nn.Module]]:
    """The layer, frozen and adapted in each way; cores and B are not zero.

    Args:
        plain: The layer.
        rank: r of all of them.
    """
    from peft import LoraConfig, get_peft_model

    yield "frozen", copy.deepcopy(plain)
    for name, transform in (("slices coupled by the DFT", "dft"), ("a core for each expert", "identity")):
        config = tcur.TCURConfig(rank=rank, transform=transform, target_modules=NAMES)
        yield name, tcur.inject(copy.deepcopy(plain), config)
    lora = LoraConfig(r=rank, target_modules=[], target_parameters=NAMES)
    yield "LoRA of PEFT", get_peft_model(copy.deepcopy(plain), lora)


def step(block: Callable[[Tensor], Tensor], trained: list[nn.Parameter], x: Tensor) -> None:
    """Forward and backward, with gradients of x and of what trains."""
    torch.autograd.grad(block(x).square().sum(), [x, *trained])


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median CPU time of each call in milliseconds; they take turns, so that all see the same load.

    Args:
        calls: What is measured, by name.
        repeats: How often.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(repeats + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if at >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: median(found) for name, found in times.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"experts": 8, "hidden": 512, "intermediate": 1024, "tokens": 512, "rank": 8, "repeats": 11}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="eager")
    given = parser.parse_args()
    torch.manual_seed(0)
    plain = layer_of_experts(given.experts, given.hidden, given.intermediate, given.implementation)
    x = torch.randn(1, given.tokens, given.hidden, requires_grad=True)
    adapted = dict(variants(plain, given.rank))
    calls, trained = {}, {}
    for name, module in adapted.items():
        block = next(inner for own, inner in module.named_modules() if own.endswith("mlp"))
        parameters = [p for p in module.parameters() if p.requires_grad]
        calls[name], trained[name] = partial(step, block, parameters, x), sum(p.numel() for p in parameters)
    found = measure(calls, given.repeats)
    rows = [(name, f"{trained[name]:,}", f"{ms:.1f}", f"{ms / found['frozen']:.2f}") for name, ms in found.items()]
    print(text_table(("", "trained", "ms", "of frozen"), rows))


if __name__ == "__main__":
    main()
