"""Sharing C and R in memory between adapters that chose the same columns and rows of the same weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tcurlora_ext.adapter.stack import TCURStack

FACTORS = ("col", "row")


def share_factors(stack: TCURStack, others: Iterable[TCURStack]) -> None:
    """Let ``stack`` use C and R of the first other stack where they are equal. They are frozen; cores stay separate."""
    for other in others:
        if all(getattr(stack, name) is getattr(other, name) for name in FACTORS):
            return
        pairs = [(getattr(stack, name), getattr(other, name)) for name in FACTORS]
        if all(own.device == its.device and not own.is_meta and torch.equal(own, its) for own, its in pairs):
            for name in FACTORS:
                setattr(stack, name, getattr(other, name))
            for sharing in (stack, other):
                sharing.register_load_state_dict_pre_hook(_keep_from_the_others)
            return


def _keep_from_the_others(stack: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state_dict with different values is loaded, copy a shared factor: other adapters keep their values."""
    for name in FACTORS:
        new, own = state_dict.get(prefix + name), getattr(stack, name)
        if new is not None and not (new.shape == own.shape and torch.equal(new.to(own), own)):
            setattr(stack, name, own.clone())
