"""FSDP2: ``tcur.shard``, and ``fully_shard`` by hand."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import distributed
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig

from ..entries import Entry
from .cases import case, cases_of
from .network import (
    DEPTH,
    Network,
    adapted,
    assert_gradients_are_of_one_process,
    assert_same_numbers,
    assert_steps_are_those_of_one_process,
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
def fsdp_has_the_gradients_of_one_process(entry: Entry, _: Path) -> None:
    for options in ({}, {"transform": "identity"}, {"core_domain": "slice"}):
        check_gradients(sharded(adapted(entry, **options)), adapted(entry, **options))


@case
def fsdp_holds_every_number_once(entry: Entry, _: Path) -> None:
    model = sharded(adapted(entry))
    check_gradients(model, adapted(entry))
    for name, parameter in model.named_parameters():
        here = torch.tensor(parameter.to_local().numel())
        distributed.all_reduce(here)
        assert int(here) == parameter.numel(), name
    assert sum(p.numel() for p in trained(model).values()) == 72 + 27


@case
def fsdp_of_the_root_alone_and_without_the_helper(entry: Entry, _: Path) -> None:
    """With one group for all, the cores are in the root's group: with one dtype this works, too."""
    mesh = processes()
    check_gradients(tcur.shard(adapted(entry), [], mesh=mesh), adapted(entry))
    plain = adapted(entry)
    for block in plain.blocks:
        fully_shard(block, mesh=mesh)
    check_gradients(fully_shard(plain, mesh=mesh), adapted(entry))


@case
def fsdp_recomputes_activations(entry: Entry, _: Path) -> None:
    check_gradients(sharded(adapted(entry, recomputes=True)), adapted(entry))


@case
def fsdp_over_a_short_base_keeps_float32_cores(entry: Entry, _: Path) -> None:
    """Trained bfloat16 parameters of the head with float32 cores, which cannot be in one group."""
    short = torch.bfloat16
    model = sharded(adapted(entry, dtype=short))
    check_gradients(model, adapted(entry, dtype=short), short, rtol=0.02)
    assert {n: p.dtype for n, p in trained(model).items() if "core" not in n}.popitem()[1] == short
    assert all(stack.core.dtype == stack.core.grad.dtype == torch.float32 for stack in entry.stacks(model).values())


@case
def fsdp_mixed_precision_leaves_the_cores_as_they_are(entry: Entry, _: Path) -> None:
    model = sharded(adapted(entry), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer: Any = model.blocks[1].mlp["linear1"]
    stack = entry.stacks(model)["16x8"]
    seen: list[tuple[torch.dtype, torch.dtype, torch.Size]] = []
    layer.register_forward_hook(lambda *_: seen.append((layer.weight.dtype, stack.core.dtype, stack.core.shape)))
    check_gradients(model, adapted(entry), rtol=0.05)
    assert seen == [(torch.bfloat16, torch.float32, (DEPTH, 2, 2))]


@case
def fsdp_steps_keep_the_processes_equal(entry: Entry, _: Path) -> None:
    assert_steps_are_those_of_one_process(entry, sharded(adapted(entry)))


@case
def fsdp_accumulates_gradients(entry: Entry, _: Path) -> None:
    class Locally(nullcontext[None]):
        def __enter__(self) -> None:
            model.set_requires_gradient_sync(False)

        def __exit__(self, *_: object) -> None:
            model.set_requires_gradient_sync(True)

    model = sharded(adapted(entry))
    assert_steps_are_those_of_one_process(entry, model, accumulate=Locally)


@case
def fsdp_evaluates_between_a_backward_pass_and_its_step(entry: Entry, _: Path) -> None:
    """What was gathered for the evaluation is not what the next step computes with."""
    single, model = adapted(entry, head=None), sharded(adapted(entry, head=None))
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
def fsdp_adapter_is_saved_by_all_and_loaded_by_one(entry: Entry, folder: Path) -> None:
    model = sharded(adapted(entry))
    fit(model, 2, mine)
    entry.save(model, folder)
    distributed.barrier()
    alone = entry.load(base(), folder)
    assert_close(output(alone), output(model), rtol=1e-5, atol=1e-6)
    assert not torch.equal(output(alone), output(base()))


@cases_of("inject")
def fsdp_adapter_of_trained_factors_is_saved_by_all(_: Entry, folder: Path) -> None:
    check_gradients(sharded(adapted(trainable="all")), adapted(trainable="all"))
    for name, options in {"all": {"trainable": "all"}, "factors": {"scale": 1.0}}.items():
        model = sharded(adapted(**options))
        fit(model, 2, mine)
        path = tcur.save_adapter(model, folder / name, include_factors=name == "factors")
        assert path.exists()
        assert_close(output(tcur.load_adapter(base(), path)), output(model), rtol=1e-5, atol=1e-6)


@cases_of("inject")
def fsdp_saving_fails_in_every_process_where_the_first_cannot_write(_: Entry, folder: Path) -> None:
    """The others do not wait for it. Afterwards all are at the same place, and a save elsewhere works."""
    model, blocked = sharded(adapted()), folder / "file"
    blocked.touch()
    first = distributed.get_rank() == 0
    reason = "" if first else r"adapter\.safetensors: the first process could not write it \(\w+Error: .*"
    with pytest.raises(OSError, match=reason + r"is not written, and an earlier one is as it was"):
        tcur.save_adapter(model, blocked / "adapter.safetensors")
    assert tcur.save_adapter(model, folder / "adapter.safetensors").exists()


@case
def fsdp_checkpoint_goes_on_where_it_stopped(entry: Entry, folder: Path) -> None:
    """torch.distributed.checkpoint: the trained parameters alone, each process its own part."""
    import torch.distributed.checkpoint as dcp

    trains = checkpoint.StateDictOptions(ignore_frozen_params=True, strict=False)
    whole = sharded(adapted(entry))
    fit(whole, 3, mine, fit(whole, 3, mine))

    first = sharded(adapted(entry))
    opt = fit(first, 3, mine)
    model_state, opt_state = checkpoint.get_state_dict(first, opt, options=trains)
    dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=folder / "step3")

    second = sharded(adapted(entry))
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
    entry.save(second, folder)
    distributed.barrier()
    assert_close(output(entry.load(base(), folder)), output(whole), rtol=1e-5, atol=1e-6)


@cases_of("inject")
def fsdp_refuses_what_needs_whole_weights(_: Entry, folder: Path) -> None:
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


@cases_of("peft")
def fsdp_saves_a_peft_adapter_of_indices_alone(entry: Entry, folder: Path) -> None:
    """The fingerprint is that of the gathered base weights."""
    model = sharded(adapted(entry, save_projection=False))
    entry.save(model, folder)
    distributed.barrier()
    assert_close(output(entry.load(base(), folder)), output(model), rtol=1e-5, atol=1e-6)
    loaded, again = (PeftModel.from_pretrained(base(), folder, is_trainable=True) for _ in range(2))
    check_gradients(sharded(loaded), again)


@cases_of("peft")
def fsdp_of_a_peft_model_with_a_second_adapter(entry: Entry, _: Path) -> None:
    """The core of the one that does not train is in the same group, and gets no gradient."""
    models: list[Any] = [adapted(entry), adapted(entry)]
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("second", TcurLoraConfig(r=3, init_weights=False))
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in name)
    check_gradients(sharded(models[0]), models[1])


@cases_of("peft")
def fsdp_refuses_merging_and_adapters_on_sharded_weights_through_peft(entry: Entry, _: Path) -> None:
    model: Any = sharded(adapted(entry))
    plain = base()
    fully_shard(plain, mesh=processes())
    with pytest.raises(ValueError, match="weight is sharded over several processes; save the adapter, load it onto"):
        model.merge_adapter()
    for add in (lambda: model.add_adapter("second", TcurLoraConfig(r=3)), lambda: entry.adapt(plain, rank=2)):
        with pytest.raises(ValueError, match="is sharded over several processes; add adapters before it is sharded"):
            add()
