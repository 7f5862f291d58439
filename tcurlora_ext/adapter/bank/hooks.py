"""The keyword ``adapter_ids`` of a model's call: hooks take it away and enter the batch for that call."""

from __future__ import annotations

import sys
import weakref
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

KEYWORD = "adapter_ids"

# The calls of models that are running, the inner ones last: a model may be called within another's call.
_calls: ContextVar[tuple[ExitStack, ...]] = ContextVar("tcurlora_calls", default=())


def take_ids_from_calls(model: nn.Module, bank: weakref.ref[Any]) -> None:
    """Let the model's calls take ``adapter_ids``, until the bank is gone.

    Args:
        model: The model; its ``forward`` does not get the keyword.
        bank: The bank.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = ExitStack()
        _calls.set((*_calls.get(), batch))  # before anything may fail: the hook below always takes one away
        found = bank()
        if found is not None and KEYWORD in kwargs:
            kwargs = dict(kwargs)
            ids = kwargs.pop(KEYWORD)
            if ids is not None:
                batch.enter_context(found.use(ids))
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(*_: Any) -> None:
        *outer, batch = _calls.get()
        _calls.set(tuple(outer))
        batch.__exit__(*sys.exc_info())  # PyTorch calls this while it handles the exception of a call

    # First, so that no other hook can fail before it; always_call: also after an exception.
    handles = (
        model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),
    )
    found = bank()
    assert found is not None
    for handle in handles:
        weakref.finalize(found, handle.remove)
