"""What many adapters in one batch cost: a bank of one, a hundred and ten thousand, beside PEFT's mixed batch.

    python -m tcurlora_ext.bench.bank [--tokens 16384] [--output bench/results]

Every token of the batch draws its adapter at random. The layer is one projection of ViT-B, or four of them as a stack.
PEFT computes a mixed batch adapter by adapter, so it is measured with one and with a hundred; ten thousand LoRAs would
take gigabytes. All forms of a case take turns, round by round, and are compared with the same form of one adapter.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import tcurlora_ext.adapter.bank as banks
from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.inject import inject
from tcurlora_ext.adapter.model.structure import stacks
from tcurlora_ext.io.records import write_csv

from .devices import choose_device, device_name, folder_name, provenance, timed
from .entry import run_command
from .run import number

WIDTH, LAYERS, RANK = 768, 4, 8
ADAPTERS = (1, 100, 10_000)
OF_PEFT = (1, 100)
FORMS = {
    "riding": TCURConfig.preset("light", rank=RANK, target_modules=r"\d+"),
    "paper's stack": TCURConfig(rank=RANK, target_modules=r"\d+"),
}
Call = Callable[[], Tensor]


def layers(device: torch.device) -> nn.Sequential:
    """Four projections of ViT-B, one after another, the same each time."""
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.04 * torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False).to(device)


def of_bank(config: TCURConfig, x: Tensor, adapters: int, training: bool) -> tuple[Call, float]:
    """A call of a model with a bank, and the bank's bytes per adapter over those of its cores."""
    model = inject(layers(x.device), config)
    bank = banks.AdapterBank(model)
    shapes = {name: stack.core.shape for name, stack in stacks(model).items()}
    bank.add_all({
        str(at): {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()} for at in range(adapters)
    })  # fmt: skip
    ids = torch.randint(adapters, (len(x),)).tolist()
    trained = bank.train() if training else []
    cores = 4 * sum(shape.numel() for shape in shapes.values())

    def call() -> Tensor:
        with bank.use(ids):
            return step(model, x, trained)

    return call, bank.nbytes / adapters / cores


def of_peft(x: Tensor, adapters: int) -> Call:
    """A call of PEFT's mixed batch, which it computes in inference alone, with LoRA of the same rank.

    Each token is a sample.
    """
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"\d+", init_lora_weights=False)
    model = peft.get_peft_model(layers(x.device), config, adapter_name="0")
    for at in range(1, adapters):
        model.add_adapter(str(at), config)
    names = [str(at) for at in torch.randint(adapters, (len(x),)).tolist()]
    return partial(step, model.eval(), x, [], adapter_names=names)


def step(model: Any, x: Tensor, trained: Sequence[nn.Parameter], **options: Any) -> Tensor:
    """A forward pass, and where parameters train a backward pass."""
    if not trained:
        with torch.no_grad():
            result: Tensor = model(x, **options)
            return result
    for parameter in trained:
        parameter.grad = None
    result = model(x)
    result.sum().backward()
    return result


def measure(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in each round; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            taken[name].append(timed(call, device)[1])
    return {name: times[1:] for name, times in taken.items()}


def rows(tokens: int, rounds: int, device: torch.device) -> list[dict[str, str]]:
    """One row per mode, form and number of adapters."""
    torch.manual_seed(0)
    x, result = torch.randn(tokens, WIDTH, device=device), []
    for training in (False, True):
        frozen = layers(device)
        if training:
            frozen.get_parameter("0.bias").requires_grad_(True)
        beside = [frozen.get_parameter("0.bias")] if training else []
        calls: dict[str, Call] = {"frozen, ": partial(step, frozen, x, beside)}
        memory = {}
        for form, config in FORMS.items():
            for adapters in ADAPTERS:
                name = f"{form}, {adapters}"
                calls[name], memory[name] = of_bank(config, x, adapters, training)
        if not training:
            calls |= {f"PEFT LoRA r={RANK}, {adapters}": of_peft(x, adapters) for adapters in OF_PEFT}
        times = measure(calls, rounds, device)
        for name in calls:
            form, _, adapters_text = name.rpartition(", ")
            first = times[f"{form}, 1"] if adapters_text else times[name]
            result.append({
                "mode": "training" if training else "inference", "form": form, "adapters": adapters_text,
                "tokens": str(tokens), "ms": number(1e3 * statistics.median(times[name])),
                "over_one": number(_ratio(times[name], first)) if adapters_text else "",
                "over_frozen": number(_ratio(times[name], times["frozen, "])),
                "bytes_over_cores": number(memory[name]) if name in memory else "",
                "rounds": str(rounds), **provenance(device),
            })  # fmt: skip
    return result


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of one time over another of the same round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def bank(
    tokens: Annotated[int, typer.Option(help="Of the batch.")] = 16384,
    rounds: Annotated[int, typer.Option(help="In which the forms take turns.")] = 7,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench/results"),
) -> None:
    """Measure banks of adapters and write bank.csv into a folder named after the device."""
    place = choose_device(device)
    found = rows(tokens, rounds, place)
    path = output / folder_name(device_name(place)) / "bank.csv"
    write_csv(path, found)
    for row in found:
        typer.echo(", ".join(f"{name} {value}" for name, value in list(row.items())[:8] if value))
    typer.echo(f"written to {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(bank, arguments, "python -m tcurlora_ext.bench.bank")


if __name__ == "__main__":
    sys.exit(main())
