"""Clients that ask a server for different adapters while others add, replace and remove adapters."""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
import uvicorn
from rich.console import Console
from rich.table import Table
from torch import nn

import tcurlora_ext as tcur

from .shelf import Shelf, random_cores

CHANGING = [f"changing-{number}" for number in range(4)]
CHECKED = 16  # answers per row and round
ROUNDS = 3  # every row is measured so often, in turns: what else the machine does then slows all rows alike
Answer = tuple[list[int], dict[str, Any]]  # a prompt and what the server answered


@dataclass
class Seen:
    """What the clients of one row saw.

    Attributes:
        answers: Prompts and answers.
        latencies: Seconds of each.
        gone: Requests for an adapter that was removed before they came: 404, as it should be.
        errors: What should not have been answered.
        changes: Adapters added, replaced or removed.
        rates: Written tokens per second, for each round.
    """

    answers: list[Answer] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    gone: int = 0
    errors: list[str] = field(default_factory=list)
    changes: int = 0
    rates: list[float] = field(default_factory=list)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve on a free port of this machine in another thread, and shut down in the end."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, args=([listening],), name="server")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                await asyncio.sleep(0.01)
            port = listening.getsockname()[1]
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)


async def asks(
    client: httpx.AsyncClient, number: int, names: list[str | None], vocabulary: int, end: float, seen: Seen
) -> None:
    """One client: a request, and when it is answered the next one."""
    draw = random.Random(number)
    while time.monotonic() < end:
        name, prompt = draw.choice(names), [draw.randrange(vocabulary) for _ in range(draw.randint(4, 24))]
        start = time.monotonic()
        body = {"adapter": name, "prompt": prompt, "new_tokens": draw.choice([8, 16, 32])}
        response = await client.post("/generate", json=body)
        if response.status_code == 200:
            seen.answers.append((prompt, response.json()))
            seen.latencies.append(time.monotonic() - start)
        elif response.status_code == 404 and name in CHANGING:
            seen.gone += 1
        else:
            seen.errors.append(response.text)


async def changes(client: httpx.AsyncClient, end: float, seeds: dict[str, int], seen: Seen) -> None:
    """Add, replace and remove adapters; the seed of each version's cores goes to `seeds`."""
    draw, there = random.Random(0), set(CHANGING)
    while time.monotonic() < end:
        name, seed = draw.choice(CHANGING), draw.randrange(10**6)
        if name in there and draw.random() < 0.5:
            response = await client.delete(f"/adapters/{name}")
            there.remove(name)
        elif name in there:
            response = await client.put(f"/adapters/{name}", json={"seed": seed})
        else:
            response = await client.post("/adapters", json={"name": name, "seed": seed})
            there.add(name)
        seen.changes += 1
        if response.is_error:
            seen.errors.append(response.text)
        elif "version" in response.json():
            seeds[response.json()["version"]] = seed
        await asyncio.sleep(0.1)


async def measured(
    app: Any, names: list[str | None], seconds: float, clients: int, vocabulary: int, seeds: dict[str, int], seen: Seen
) -> None:
    """Let clients ask for the named adapters; where the changing ones are among them, change these meanwhile."""
    before = len(seen.answers)
    async with served(app) as client:
        for seed, name in enumerate(name for name in names if name is not None):
            response = await client.post("/adapters", json={"name": name, "seed": seed})
            seeds[response.raise_for_status().json()["version"]] = seed
        start = time.monotonic()
        end = start + seconds
        tasks = [asks(client, number, names, vocabulary, end, seen) for number in range(clients)]
        if CHANGING[0] in names:
            tasks.append(changes(client, end, seeds, seen))
        await asyncio.gather(*tasks)
        written = sum(len(answer["tokens"]) for _, answer in seen.answers[before:])
        seen.rates.append(written / (time.monotonic() - start))


@torch.no_grad()
def equal(model: nn.Module, answers: list[Answer], seeds: dict[str, int]) -> int:
    """How many answers are what the adapter alone writes, computed without bank, batch and cache.

    A written token has to have the largest logit, or one that is less than float32's rounding below it.

    Args:
        model: The adapted model without a bank; its own cores are overwritten.
    """
    count = 0
    for prompt, answer in answers:
        cores = random_cores(model, seeds[answer["version"]]) if answer["version"] else {}
        for name, stack in tcur.stacks(model).items():
            stack.core.copy_(cores[name]) if cores else stack.core.zero_()
        tokens = torch.tensor([prompt + answer["tokens"]], device=next(model.parameters()).device)
        logits = model(tokens).logits[0, len(prompt) - 1 : -1]
        written = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        count += int((logits.amax(-1) - written).max() <= 1e-4 * logits.abs().max())
    return count


def run(
    base: Any, tokenizer: Any, options: argparse.Namespace, make_app: Callable[..., Any], adapted: Callable[..., Any]
) -> None:
    """Measure the plain base, one adapter and many; print the table and what was checked."""
    alone = adapted(copy.deepcopy(base), options.rank)
    steady = [f"steady-{number}" for number in range(options.many)]
    rows: dict[str, list[str | None]] = {
        "base alone": [None],
        "1 adapter": [steady[0]],
        f"{options.many} adapters": [*steady],
        "the same, changing": [*steady, *CHANGING],
    }
    seen = {label: Seen() for label in rows}
    checked = same = 0
    for _ in range(ROUNDS):
        for label, names in rows.items():
            model, row = copy.deepcopy(base), seen[label]
            shelf = None if names == [None] else Shelf(adapted(model, options.rank), None)
            app = make_app(model, tokenizer, shelf, options)
            seeds: dict[str, int] = {}  # of each version of an adapter
            first, seconds = len(row.answers), options.load_test / len(rows) / ROUNDS
            asyncio.run(measured(app, names, seconds, options.clients, base.config.vocab_size, seeds, row))
            sample = sorted(row.answers[first:], key=lambda answer: answer[1]["adapter"] not in CHANGING)[:CHECKED]
            checked, same = checked + len(sample), same + equal(alone, sample, seeds)
    table = Table("", "requests", "tokens/s", "p50, ms", "p95, ms", "changes", "errors")
    for label, row in seen.items():
        latencies = torch.tensor(row.latencies or [float("nan")]) * 1000
        half, most = (f"{latencies.quantile(share):.0f}" for share in (0.5, 0.95))
        rate = f"{sorted(row.rates)[ROUNDS // 2]:.0f}"
        table.add_row(label, str(len(row.answers)), rate, half, most, str(row.changes), str(len(row.errors)))
    Console().print(table)
    print(f"{same} of {checked} answers that were checked are what their adapter alone writes")
    print(
        f"{sum(row.gone for row in seen.values())} requests came after their adapter had been removed, and were told so"
    )
    errors = [error for row in seen.values() for error in row.errors]
    if errors:
        print(f"the first error: {errors[0]}")
