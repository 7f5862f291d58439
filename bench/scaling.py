"""Llama from 7B to 405B on many processes, by count: what ``tcurlora plan --ranks`` says about each size.

    python -m tcurlora_ext.bench.scaling      writes bench/results/plan/llama.csv, which docs/scaling.md shows
    tcurlora plan tcurlora_ext.bench.scaling:llama --kwargs '{"size": "405B"}' --dtype bfloat16 --ranks 64

Nothing is measured and no weights are allocated. The rates are round numbers, not those of a particular machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.analysis.plan import plan
from tcurlora_ext.analysis.processes import RankCost, Rates, rank_costs
from tcurlora_ext.io.records import write_csv

from .entry import run_command

# hidden size, intermediate size, layers, heads, key and value heads, vocabulary: Llama 2 7B, Llama 3.1 8B, 70B, 405B.
SIZES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
RANKS, TOKENS, RANK = 64, 8192, 8
RATES = Rates(flops=4e14, bytes=5e10)
DTYPE = torch.bfloat16


def llama(size: str = "7B") -> nn.Module:
    """transformers' Llama of this size; build it on the meta device. Raises ValueError for an unknown size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in SIZES:
        raise ValueError(f"size: found {size!r}, expected one of {', '.join(SIZES)}")
    hidden, intermediate, layers, heads, pairs, vocabulary = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=pairs, vocab_size=vocabulary, tie_word_embeddings=False,
        )
    )  # fmt: skip


def rows(sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record per size, method and layout: tCUR with stacks by shape and by role, and LoRA of the same rank."""
    for size in sizes:
        with torch.device("meta"):
            model = llama(size)
        for stack_by in ("shape", "role"):
            found = plan(model, TCURConfig(rank=RANK, stack_by=stack_by), TOKENS, RANK, DTYPE)
            for cost in rank_costs(model, found, RANKS, RATES, DTYPE):
                if cost.method == "lora" and stack_by == "shape":  # once is enough
                    continue
                of_method = found.tcur if cost.method == "tcur" else found.lora
                base = found.base.forward + found.base.backward
                yield _named(cost, stack_by) | {
                    "model": size, "numbers": of_method.trained, "tokens": TOKENS, "dtype": found.dtype,
                    "flops_over_base": (of_method.forward + of_method.backward) / base + 1,
                    "rate_flops": RATES.flops, "rate_bytes": RATES.bytes,
                }  # fmt: skip


def _named(cost: RankCost, stack_by: str) -> dict[str, Any]:
    names = {"tcur": f"tCUR r={RANK}, by {stack_by}", "lora": f"LoRA r={RANK}"}
    return asdict(cost) | {"method": names[cost.method]}


def scaling(
    output: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("bench/results/plan/llama.csv"),
) -> None:
    """Count what tCUR and LoRA cost on many processes, for Llama from 7B to 405B, and write CSV."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, list(rows(list(SIZES))))
    typer.echo(output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(scaling, arguments, "python -m tcurlora_ext.bench.scaling")


if __name__ == "__main__":
    sys.exit(main())
