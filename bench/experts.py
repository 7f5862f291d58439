"""The CPU time of a training step of a layer of experts: frozen, adapted, and with PEFT's LoRA in the same parameters.

    python -m tcurlora_ext.bench.experts

LoRA with ``target_parameters`` adds a dense change to the weights of all experts in every call.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.table import text_table

from .entry import run_command

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def layer_of_experts(experts: int, hidden: int, intermediate: int, implementation: str) -> nn.Module:
    """Mixtral's layer of experts with two experts for a token, and its router.

    Args:
        experts: The number of experts.
        hidden: The width of the tokens.
        intermediate: The width between the experts' two products.
        implementation: That of transformers, one of ``IMPLEMENTATIONS``.

    Raises:
        ValueError: The implementation is another one.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: found {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
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


def experts(
    experts: Annotated[int, typer.Option(help="Of the layer.")] = 8,
    hidden: Annotated[int, typer.Option(help="Width of the tokens.")] = 512,
    intermediate: Annotated[int, typer.Option(help="Width between the experts' two products.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Of the batch.")] = 512,
    rank: Annotated[int, typer.Option(help="r of every adapter.")] = 8,
    repeats: Annotated[int, typer.Option(help="Steps of each, of which the median is shown.")] = 11,
    implementation: Annotated[str, typer.Option(help=f"One of {', '.join(IMPLEMENTATIONS)}.")] = "eager",
) -> None:
    """Measure a training step of a layer of experts: frozen, adapted, and with PEFT's LoRA in the same parameters."""
    torch.manual_seed(0)
    plain = layer_of_experts(experts, hidden, intermediate, implementation)
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    adapted = dict(variants(plain, rank))
    calls, trained = {}, {}
    for name, module in adapted.items():
        block = next(inner for own, inner in module.named_modules() if own.endswith("mlp"))
        parameters = [p for p in module.parameters() if p.requires_grad]
        calls[name], trained[name] = partial(step, block, parameters, x), sum(p.numel() for p in parameters)
    found = measure(calls, repeats)
    rows = [(name, f"{trained[name]:,}", f"{ms:.1f}", f"{ms / found['frozen']:.2f}") for name, ms in found.items()]
    typer.echo(text_table(("", "trained", "ms", "of frozen"), rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(experts, arguments, "python -m tcurlora_ext.bench.experts")


if __name__ == "__main__":
    sys.exit(main())
