"""``to_lora``: a tCURLoRA adapter as an exact LoRA adapter, for engines that serve LoRA."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import nn

from tcurlora_ext.adapter.files.lora import source_of, write_lora


def to_lora(
    model: nn.Module, path: str | os.PathLike[str], max_rank: int = 512, adapter_name: str | None = None
) -> Path:
    """Write a model's adapter as a LoRA adapter in PEFT's file format: exact, since each dW is a product B A.

    ``PeftModel.from_pretrained(base, path)``, or an engine that serves LoRA (vLLM, SGLang, llama.cpp, ...), then gives
    the adapted model's output up to rounding, without this package. A and B are computed in float64 and rounded once,
    to the base's dtype, for a 16-bit base to float32. The scale is in B, so ``lora_alpha`` is r.

    The rank is r*S for a core that S slices share, c*S where that is smaller, and r where every slice has its own
    (``transform="identity"`` or ``stack_by="none"``). A fused projection of n slices has r*S too, but n*r where every
    slice has its own core. All modules get the largest rank; smaller ones are filled with zeros.

    Modules that were trained beside the cores, such as a norm or a head, become PEFT's ``modules_to_save``, with
    running statistics that training has changed. PEFT loads them. vLLM refuses an adapter that has any: for it, train
    the cores alone. Dropout has no effect on the file.

    Args:
        model: A model adapted by :func:`inject`, merged or not; a ``PeftModel`` with a ``TcurLoraConfig``; or a module
            around one, such as a wrapper of DDP or torch.compile. Names in the file are those of the base.
        path: The folder, created where it is missing. A LoRA adapter in it is replaced when the new one is complete;
            other files in it stay.
        max_rank: The largest rank that is written; 512 is the largest that vLLM serves.
        adapter_name: The adapter of a ``PeftModel``; None: the active one.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not adapted, is a part of an adapted one or is sharded over processes; the rank is
            above ``max_rank``; something that trained beside the cores is no whole module (the bias of an adapted
            layer, a parameter of the model itself); an adapted module is at two places in the model; a value is NaN or
            infinite; or ``path`` is a file or has an adapter of another kind. Nothing is written.
        ModuleNotFoundError: PEFT, which writes the configuration, is not installed.
        OSError: The system refuses the folder or a file.

    Warns:
        UserWarning: Adapted layers were never called, or cores never trained, while others were.
    """
    peft = sys.modules.get("peft")  # where it was not imported, no model is a PeftModel
    of_peft = None if peft is None else next((m for m in model.modules() if isinstance(m, peft.PeftModel)), None)
    if of_peft is not None:
        from .peft.lora import source_of as source_of_peft

        return write_lora(source_of_peft(of_peft, adapter_name), path, max_rank)
    if adapter_name is not None:
        raise ValueError(f"adapter_name is {adapter_name!r}, expected None: {type(model).__name__} is no PeftModel")
    return write_lora(source_of(model), path, max_rank)
