"""DDP and FSDP2 over learned factors: the gradients and the files of one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

from ..entries import Entry
from .cases import case, cases_of
from .ddp import ddp
from .fsdp import check_gradients, sharded
from .network import (
    Network,
    adapted,
    assert_gradients_are_of_one_process,
    assert_same_everywhere,
    base,
    batches,
    fit,
    loss,
    mine,
    output,
)

FORMS: dict[str, dict[str, Any]] = {
    "own cores": {"stack_by": "none", "transform": "identity", "factors": "learned"},
    "coupled": {"factors": "learned"},
    "rows alone": {"stack_by": "none", "transform": "identity", "factors": "learned_rows"},
}


def step(model: nn.Module) -> Tensor:
    return loss(model, *next(batches(1)))


@cache
def subspace(form: str) -> tcur.Subspace:
    return tcur.learn_factors(base(), tcur.TCURConfig(rank=2, **FORMS[form]), step, steps=4)


def forms(entry: Entry) -> Iterator[tuple[Network, Network]]:
    """For every form two adapted networks with the same numbers."""
    for form, options in FORMS.items():
        yield tuple(adapted(entry, subspace=subspace(form), **options) for _ in range(2))  # type: ignore[misc]


@cases_of("inject")
def factors_are_the_same_bits_everywhere(entry: Entry, _: Path) -> None:
    for model, _again in forms(entry):
        for name, stack in entry.stacks(model).items():
            assert_same_everywhere(stack.col, name)
            assert_same_everywhere(stack.row, name)


@case
def ddp_over_learned_factors(entry: Entry, _: Path) -> None:
    for single, plain in forms(entry):
        model = ddp(plain)
        x, y = next(batches(1))
        loss(single, x, y).backward()
        loss(model, mine(x), mine(y)).backward()
        assert_gradients_are_of_one_process(model, single)


@case
def fsdp_over_learned_factors(entry: Entry, folder: Path) -> None:
    for at, (single, plain) in enumerate(forms(entry)):
        model = sharded(plain)
        check_gradients(model, single)
        fit(model, 2, mine)
        own = folder / str(at)
        own.mkdir(exist_ok=True)
        entry.save(model, own)
        distributed.barrier()
        assert_close(output(entry.load(base(), own)), output(model), rtol=1e-5, atol=1e-6)


@cases_of("inject")
def fsdp_steps_over_learned_factors(entry: Entry, _: Path) -> None:
    def make(recomputes: bool = False) -> Network:
        form = "own cores"
        return adapted(entry, subspace=subspace(form), recomputes=recomputes, **FORMS[form])

    check_gradients(sharded(make(recomputes=True)), make())


@cases_of("inject")
def factors_are_not_learned_on_sharded_weights(entry: Entry, _: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(base())
    with pytest.raises(ValueError, match=r"is sharded over several processes; call learn_factors before it is sharded"):
        tcur.learn_factors(model, tcur.TCURConfig.preset("learned", rank=2), step)
