"""An adapted model on several processes: FSDP2 around its blocks, with the cores in a group of their own.

DDP and accelerate need nothing from this module: to them an adapted model is a model with few trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tcurlora_ext.adapter.stack import TCURStack

# The options that the cores' group shares with the other groups. It keeps its own dtype and stays gathered.
_SHARED = ("mesh", "offload_policy")


def shard(model: nn.Module, blocks: Iterable[nn.Module], **options: Any) -> nn.Module:
    """Shard an adapted model by FSDP2, in place: ``fully_shard`` on every block, then on the model.

    Every process calls it before creating the optimizer, on a model with the same weights and adapter.

    All blocks use the cores, so the cores are a group of their own. They are gathered when the model is called, stay
    gathered until the end of backward and are reduced once, in their own dtype whatever ``mp_policy`` says. In the
    model's group they would be cast to its dtype, and FSDP would refuse trained parameters of another dtype there.

    Args:
        model: A model adapted by :func:`inject` or by PEFT (``get_peft_model``); not merged.
        blocks: The modules to gather one at a time, such as ``model.model.layers`` of a Llama.
        **options: Options of ``torch.distributed.fsdp.fully_shard``: mesh, mp_policy, reshard_after_forward, ...
            Of these, mesh and offload_policy apply to the cores' group too.

    Returns:
        The model itself.

    Raises:
        ValueError: The model is not adapted, a layer is merged, or a block is not a module of the model; nothing is
            changed.
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
        # Without a backward pass FSDP does not release them, and a later call would use values from before a step.
        if not torch.is_grad_enabled():
            cores.reshard()

    model.register_forward_hook(release)
    return model
