"""DistributedDataParallel and accelerate around it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..entries import Entry
from .cases import case
from .network import (
    adapted,
    assert_gradients_are_of_one_process,
    assert_same_numbers,
    assert_steps_are_those_of_one_process,
    base,
    batches,
    fit,
    loss,
    mine,
    optimizer,
    output,
    trained,
)


def ddp(model: nn.Module) -> DistributedDataParallel:
    named = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(model, **{"forward_sync_buffers" if named else "broadcast_buffers": False})


@case
def ddp_sends_the_trained_numbers_and_has_the_gradients_of_one_process(entry: Entry, _: Path) -> None:
    single, model = adapted(entry), ddp(adapted(entry))
    sent: list[int] = []

    def count(state, bucket):  # DDP reads annotations, and strings are none to it
        sent.append(bucket.buffer().numel())
        buffer = bucket.buffer() / distributed.get_world_size()
        return distributed.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, count)
    x, y = next(batches(1))
    loss(single, x, y).backward()
    loss(model, mine(x), mine(y)).backward()
    assert_gradients_are_of_one_process(model, single)
    # A core is shared by many layers and counted once: 2 * 2 * (12 + 3 + 3) numbers and the head.
    assert sum(sent) == entry.trained(single) == 72 + 27


@case
def ddp_steps_keep_the_processes_equal(entry: Entry, _: Path) -> None:
    assert_steps_are_those_of_one_process(entry, ddp(adapted(entry)))


@case
def ddp_accumulates_gradients(entry: Entry, _: Path) -> None:
    model = ddp(adapted(entry))
    assert_steps_are_those_of_one_process(entry, model, accumulate=model.no_sync)


@case
def ddp_adapter_is_saved_by_one_process(entry: Entry, folder: Path) -> None:
    model = ddp(adapted(entry))
    fit(model, 2, mine)
    if distributed.get_rank() == 0:
        entry.save(model.module, folder)
    distributed.barrier()
    alone = entry.load(base(), folder)
    assert torch.equal(output(alone), output(model.module))


@case
def accelerate_trains_saves_and_resumes(entry: Entry, folder: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    assert accelerator.num_processes == 2
    single = adapted(entry)
    fit(single, 4, lambda x: x)
    plain = adapted(entry)
    model, opt = accelerator.prepare(plain, optimizer(plain))
    assert isinstance(model, DistributedDataParallel)

    def steps(wanted: Iterable[int]) -> None:
        for at, (x, y) in enumerate(batches(4)):
            if at in wanted:
                accelerator.backward(loss(model, mine(x), mine(y)))
                accelerator.clip_grad_norm_(trained(model).values(), 1.0)
                opt.step()
                opt.zero_grad()

    steps((0, 1))
    accelerator.save_state(str(folder / "state"))
    steps((2, 3))
    assert_same_numbers(model, single)
    accelerator.load_state(str(folder / "state"))
    steps((2, 3))
    assert_same_numbers(model, single)
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        entry.save(unwrapped, folder)
    accelerator.wait_for_everyone()
    assert torch.equal(output(entry.load(base(), folder)), output(unwrapped))
