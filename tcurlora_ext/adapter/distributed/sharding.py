"""An adapted model on several processes: FSDP2 around its blocks, the cores in a group of their own.

DDP and accelerate need nothing from here: they see an ordinary model of which few parameters train.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tcurlora_ext.adapter.stack import TCURStack

# What the cores' group takes over from the options of the other groups. It keeps its dtype, and stays gathered.
_SHARED = ("mesh", "offload_policy")


def shard(model: nn.Module, blocks: Iterable[nn.Module], **options: Any) -> nn.Module:
    """Shard an adapted model by FSDP2, in place: ``fully_shard`` on every block, then on the model.

    Every process calls it, on a model of the same weights and adapter, before it makes the optimizer.

    All blocks read the cores, so these are a group of their own: gathered as the model is called, there until the end
    of backward, reduced once, and in their own dtype whatever ``mp_policy`` says. In the model's group they would be
    cast to its dtype, and refused beside trained parameters of another one.

    Args:
        model: One that :func:`inject` adapted, or PEFT's around one (``get_peft_model``); not merged.
        blocks: The modules gathered one at a time, such as ``model.model.layers`` of a Llama.
        **options: Those of ``torch.distributed.fsdp.fully_shard``: mesh, mp_policy, reshard_after_forward, ...
            The cores' group takes over mesh and offload_policy alone.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted, a layer is merged, or a block is not a module of it; nothing is changed.
    """
    from torch.distributed.fsdp import fully_shard

    stacks: list[nn.Module] = [module for module in model.modules() if isinstance(module, TCURStack)]
    if not stacks:
        raise ValueError(f"{type(model).__name__} is not adapted; call inject(model) or get_peft_model(...) first")
    merged = next((name for name, module in model.named_modules() if getattr(module, "merged", False) is True), None)
    if merged is not None:
        raise ValueError(f"{merged} is merged: unmerge the model before shard(model)")
    blocks, modules = list(blocks), set(model.modules())
    foreign = next((block for block in blocks if block not in modules), None)
    if foreign is not None:
        raise ValueError(f"blocks: found a {type(foreign).__name__} that is not within {type(model).__name__}")

    shared = {name: options[name] for name in _SHARED if name in options}
    cores = fully_shard(stacks, reshard_after_forward=False, **shared)[0]
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)

    # Nothing calls a stack as a module, so FSDP's own hooks do not gather its core.
    model.register_forward_pre_hook(lambda *_: cores.unshard())

    def release(*_: object) -> None:
        # No backward pass will do it; the next call would see values from before an optimizer's step.
        if not torch.is_grad_enabled():
            cores.reshard()

    model.register_forward_hook(release)
    return model
