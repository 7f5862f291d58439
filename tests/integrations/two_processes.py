"""What two processes have to agree on with one: run by torchrun, which test_processes.py starts.

    PYTHONPATH=tests torchrun --nproc-per-node 2 -m integrations.two_processes FOLDER

Every function marked ``@case`` runs in both processes, with a folder of its own that they share; what each found is
written to FOLDER/<case>-<rank>.txt, a traceback or nothing.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import tcurlora_ext as tcur

from .shared_network import (
    DEPTH,
    Network,
    adapted,
    assert_gradients_are_of_one_process,
    assert_same_numbers,
    base,
    batches,
    fit,
    full,
    loss,
    mine,
    optimizer,
    output,
    trained,
)

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


# -- DDP --------------------------------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> DistributedDataParallel:
    named = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(model, **{"forward_sync_buffers" if named else "broadcast_buffers": False})


@case
def ddp_sends_the_trained_numbers_and_has_the_gradients_of_one_process(_: Path) -> None:
    single, model = adapted(), ddp(adapted())
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
    assert sum(sent) == tcur.summary(single).trained == 72 + 27


@case
def ddp_steps_keep_the_processes_equal(_: Path) -> None:
    single, model = adapted(), ddp(adapted())
    fit(single, 4, lambda x: x)
    fit(model, 4, mine)
    assert_same_numbers(model, single)


@case
def ddp_accumulates_gradients(_: Path) -> None:
    single, model = adapted(), ddp(adapted())
    fit(single, 4, lambda x: x, accumulate=nullcontext)
    fit(model, 4, mine, accumulate=model.no_sync)
    assert_same_numbers(model, single)


@case
def ddp_adapter_is_saved_by_one_process(folder: Path) -> None:
    model = ddp(adapted())
    fit(model, 2, mine)
    if distributed.get_rank() == 0:
        tcur.save_adapter(model.module, folder / "adapter.safetensors")
    distributed.barrier()
    alone = tcur.load_adapter(base(), folder)
    assert torch.equal(output(alone), output(model.module))


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


@cache
def processes() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def sharded(model: Network, **options: Any) -> Network:
    tcur.shard(model, model.blocks, mesh=processes(), **options)
    return model


def check_gradients(model: Network, single: Network, dtype: torch.dtype = torch.float32, rtol: float = 1e-4) -> None:
    x, y = next(batches(1, dtype))
    loss(single, x, y).backward()
    loss(model, mine(x), mine(y)).backward()
    assert_gradients_are_of_one_process(model, single, rtol)


@case
def fsdp_has_the_gradients_of_one_process(_: Path) -> None:
    for options in ({}, {"trainable": "all"}, {"transform": "identity"}, {"core_domain": "slice"}):
        check_gradients(sharded(adapted(**options)), adapted(**options))


@case
def fsdp_holds_every_number_once(_: Path) -> None:
    model = sharded(adapted())
    check_gradients(model, adapted())
    for name, parameter in model.named_parameters():
        here = torch.tensor(parameter.to_local().numel())
        distributed.all_reduce(here)
        assert int(here) == parameter.numel(), name
    assert sum(p.numel() for p in trained(model).values()) == 72 + 27


@case
def fsdp_of_the_root_alone_and_without_the_helper(_: Path) -> None:
    """One group for all, and the cores in the root's group: in one dtype this works, too."""
    mesh = processes()
    check_gradients(tcur.shard(adapted(), [], mesh=mesh), adapted())
    plain = adapted()
    for block in plain.blocks:
        fully_shard(block, mesh=mesh)
    check_gradients(fully_shard(plain, mesh=mesh), adapted())


@case
def fsdp_recomputes_activations(_: Path) -> None:
    check_gradients(sharded(adapted(recomputes=True)), adapted())


@case
def fsdp_over_a_short_base_keeps_float32_cores(_: Path) -> None:
    """Trained bfloat16 parameters of the head beside float32 cores, which one group refuses."""
    short = torch.bfloat16
    model = sharded(adapted(dtype=short))
    check_gradients(model, adapted(dtype=short), short, rtol=0.02)
    assert {n: p.dtype for n, p in trained(model).items() if "core" not in n}.popitem()[1] == short
    assert all(stack.core.dtype == stack.core.grad.dtype == torch.float32 for stack in tcur.stacks(model).values())


@case
def fsdp_mixed_precision_leaves_the_cores_as_they_are(_: Path) -> None:
    model = sharded(adapted(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer: Any = model.blocks[1].mlp["linear1"]
    seen: list[tuple[torch.dtype, torch.dtype, torch.Size]] = []
    layer.register_forward_hook(
        lambda *_: seen.append((layer.weight.dtype, layer.stack.core.dtype, layer.stack.core.shape))
    )
    check_gradients(model, adapted(), rtol=0.05)
    assert seen == [(torch.bfloat16, torch.float32, (DEPTH, 2, 2))]


@case
def fsdp_steps_keep_the_processes_equal(_: Path) -> None:
    single, model = adapted(), sharded(adapted())
    fit(single, 4, lambda x: x)
    fit(model, 4, mine)
    assert_same_numbers(model, single)


@case
def fsdp_accumulates_gradients(_: Path) -> None:
    class Locally(nullcontext[None]):
        def __enter__(self) -> None:
            model.set_requires_gradient_sync(False)

        def __exit__(self, *_: object) -> None:
            model.set_requires_gradient_sync(True)

    single, model = adapted(), sharded(adapted())
    fit(single, 4, lambda x: x, accumulate=nullcontext)
    fit(model, 4, mine, accumulate=Locally)
    assert_same_numbers(model, single)


@case
def fsdp_evaluates_between_a_backward_pass_and_its_step(_: Path) -> None:
    """What was gathered for the evaluation is not what the next step computes with."""
    single, model = adapted(head=False), sharded(adapted(head=False))
    opts = [optimizer(single), optimizer(model)]
    for x, y in batches(3):
        for m, opt, share in zip((single, model), opts, (lambda x: x, mine), strict=True):
            loss(m, share(x), share(y)).backward()
            output(m)
            opt.step()
            opt.zero_grad()
    assert_same_numbers(model, single)
    assert_close(output(model), output(single), rtol=1e-4, atol=1e-5)


@case
def fsdp_adapter_is_saved_by_all_and_loaded_by_one(folder: Path) -> None:
    for name, options in {"core": {}, "all": {"trainable": "all"}, "factors": {"scale": 1.0}}.items():
        model = sharded(adapted(**options))
        fit(model, 2, mine)
        path = tcur.save_adapter(model, folder / name, include_factors=name == "factors")
        assert path.exists()
        alone = tcur.load_adapter(base(), path)
        assert_close(output(alone), output(model), rtol=1e-5, atol=1e-6)
        assert not torch.equal(output(alone), output(base()))


@case
def fsdp_checkpoint_goes_on_where_it_stopped(folder: Path) -> None:
    """torch.distributed.checkpoint: the trained parameters alone, each process its own part."""
    import torch.distributed.checkpoint as dcp

    trains = checkpoint.StateDictOptions(ignore_frozen_params=True, strict=False)
    whole = sharded(adapted())
    fit(whole, 3, mine, fit(whole, 3, mine))

    first = sharded(adapted())
    opt = fit(first, 3, mine)
    model_state, opt_state = checkpoint.get_state_dict(first, opt, options=trains)
    dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=folder / "step3")

    second = sharded(adapted())
    with torch.no_grad():
        for parameter in trained(second).values():
            parameter.zero_()
    opt = optimizer(second)
    model_state, opt_state = checkpoint.get_state_dict(second, opt, options=trains)
    dcp.load({"model": model_state, "optimizer": opt_state}, checkpoint_id=folder / "step3")
    checkpoint.set_state_dict(second, opt, model_state_dict=model_state, optim_state_dict=opt_state, options=trains)
    fit(second, 3, mine, opt)
    for name, parameter in trained(second).items():
        assert torch.equal(full(parameter.detach()), full(trained(whole)[name].detach())), name
    alone = tcur.load_adapter(base(), tcur.save_adapter(second, folder / "adapter.safetensors"))
    assert_close(output(alone), output(whole), rtol=1e-5, atol=1e-6)


@case
def fsdp_refuses_what_needs_whole_weights(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    model = sharded(adapted())
    tcur.save_adapter(model, path)
    plain = base()
    fully_shard(plain, mesh=processes())
    sharded_already = "embed.weight is sharded over several processes; "
    with pytest.raises(ValueError, match=sharded_already + "load .*adapter.safetensors before shard"):
        tcur.load_adapter(model, path)
    with pytest.raises(ValueError, match=sharded_already + "save the adapter, load it onto the base in one process"):
        tcur.merge(model)
    with pytest.raises(ValueError, match=sharded_already + "call inject"):
        tcur.inject(plain)


# -- accelerate -------------------------------------------------------------------------------------------------------


@case
def accelerate_trains_saves_and_resumes(folder: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    assert accelerator.num_processes == 2
    single = adapted()
    fit(single, 4, lambda x: x)
    plain = adapted()
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
        tcur.save_adapter(unwrapped, folder / "adapter.safetensors")
    accelerator.wait_for_everyone()
    assert torch.equal(output(tcur.load_adapter(base(), folder)), output(unwrapped))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, function in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            function(folder / name)
            found = ""
        except Exception:
            found = traceback.format_exc()
        (folder / f"{name}-{distributed.get_rank()}.txt").write_text(found)
        # Processes that failed at different places would wait for each other from here on.
        failed = torch.tensor(float(bool(found)))
        distributed.all_reduce(failed)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # FSDP2 over gloo sometimes aborts as the interpreter ends ("terminate called without an active exception"), also
    # in a program of plain linear layers without this package; all is written by now.
    os._exit(0)
