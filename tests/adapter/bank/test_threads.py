"""Batches in several threads while others add, replace and remove adapters: nothing is mixed, nothing is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import BOTH, make

SECONDS = 2.0
STABLE, CHANGING, COMING = 4, 4, 4


class Versions:
    """An adapter's cores are one constant: what a batch used can be told from its output, and compared with the log."""

    def __init__(self, model: Any) -> None:
        self._like = {name: stack.core.detach() for name, stack in tcur.stacks(model).items()}
        self._lock = threading.Lock()
        self.log: dict[str, list[tuple[float, float, float]]] = {}  # name -> (constant, set at, replaced at)

    def cores(self, constant: float) -> dict[str, Tensor]:
        return {name: torch.full_like(like, constant) for name, like in self._like.items()}

    def begin(self, name: str, constant: float) -> None:
        with self._lock:
            self.log.setdefault(name, []).append((constant, time.monotonic(), float("inf")))

    def end_before(self, name: str) -> None:
        """All versions but the last one are over."""
        with self._lock:
            versions = self.log[name]
            now = time.monotonic()
            versions[:-1] = [(c, since, min(until, now)) for c, since, until in versions[:-1]]

    def possible(self, name: str, start: float, end: float) -> list[float]:
        with self._lock:
            return [c for c, since, until in self.log[name] if since <= end and until >= start]


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("pool", [None, "cpu"])
def test_every_output_is_of_a_version_that_there_was(form: str, pool: str | None) -> None:
    model = make(form).eval()
    versions = Versions(model)
    bank = tcur.AdapterBank(model, pool=pool, capacity=None if pool is None else 10)
    known: dict[float, Tensor] = {}
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    # A hundred constants, whose outputs are computed beforehand.
    constants = [0.01 * at for at in range(1, 101)]
    for constant in constants:
        for name, core in versions.cores(constant).items():
            tcur.stacks(model)[name].core.data.copy_(core)
        known[constant] = model(x).detach()
    for stack in tcur.stacks(model).values():
        stack.core.data.zero_()
    base = model(x).detach()
    names = [f"stable {at}" for at in range(STABLE)] + [f"changing {at}" for at in range(CHANGING)]
    for at, name in enumerate(names):
        versions.begin(name, constants[at])
        bank.add(name, versions.cores(constants[at]))
    stop, errors, counts = threading.Event(), [], {"batches": 0, "changes": 0}

    def guarded(work: Callable[[random.Random], None], seed: int) -> Callable[[], None]:
        def run() -> None:
            chance = random.Random(seed)
            try:
                while not stop.is_set():
                    work(chance)
            except Exception as error:
                errors.append(error)
                stop.set()

        return run

    def batches(chance: random.Random) -> None:
        asked = [chance.choice([*names, None]) for _ in range(5)]
        start = time.monotonic()
        with torch.set_grad_enabled(chance.random() < 0.3):
            y = model(x.expand(5, -1, -1), adapter_ids=[-1 if name is None else name for name in asked]).detach()
        end = time.monotonic()
        for row, name in zip(y, asked, strict=True):
            expected = [base] if name is None else [known[c] for c in versions.possible(name, start, end)]
            assert any(torch.allclose(row, e[0], rtol=1e-10, atol=1e-10) for e in expected), name
        counts["batches"] += 1

    def replacing(chance: random.Random) -> None:
        name, constant = f"changing {chance.randrange(CHANGING)}", chance.choice(constants)
        versions.begin(name, constant)
        bank.replace(name, versions.cores(constant))
        versions.end_before(name)
        counts["changes"] += 1

    def coming_and_going(chance: random.Random) -> None:
        """Adapters that are added fill the slots of those that were replaced or removed."""
        for at in range(COMING):
            bank.add(f"coming {at}", versions.cores(chance.choice(constants)))
        for at in range(COMING):
            bank.remove(f"coming {at}")

    works = [batches, batches, replacing, coming_and_going]
    threads = [threading.Thread(target=guarded(work, seed)) for seed, work in enumerate(works)]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert counts["batches"] > 10
    assert counts["changes"] > 10
    for at in range(STABLE):
        for name, core in bank.cores(f"stable {at}").items():
            assert_close(core, versions.cores(constants[at])[name], rtol=0, atol=0)
    assert [name for name in bank.names if not name.startswith("coming")] == names


def test_threads_do_not_see_each_others_ids() -> None:
    model = make()
    bank = tcur.AdapterBank(model)
    bank.add("a", {name: torch.ones_like(stack.core) for name, stack in tcur.stacks(model).items()})
    x, found = torch.randn(1, 4, 8, dtype=torch.float64), []
    own = model(x)
    with bank.use(["a"]):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
        assert not torch.allclose(model(x), own)
    assert_close(found[0], own, rtol=0, atol=0)


def test_batches_wait_for_each_others_room() -> None:
    """Two threads whose batches each need the whole device."""
    model = make()
    bank = tcur.AdapterBank(model, capacity=3, pool="cpu")
    bank.add_all({str(at): None for at in range(6)})
    x, errors = torch.randn(3, 4, 8, dtype=torch.float64), []

    def work(ids: list[str]) -> None:
        try:
            for _ in range(20):
                with torch.no_grad():
                    model(x, adapter_ids=ids)
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(ids,)) for ids in (["0", "1", "2"], ["3", "4", "5"], ["1", "3", "5"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
