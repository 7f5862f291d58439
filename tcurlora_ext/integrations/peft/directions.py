"""Checkpoints over learned factors: the subspace in place of C and R, coded, or its digest alone.

Such a checkpoint has, for every stack, the core, ``rows``, ``columns`` and ``scale``; and once
``base_model.tcurlora_subspace``, a text as bytes: JSON with ``digest``, and with ``save_projection`` also ``subspace``,
the description in the subspace's file. Beside that description are the coded directions, ``tcurlora_left.<stack>`` and
``tcurlora_right.<stack>``, by the subspace's names of stacks. C and R are decoded on loading, for the base weights on
which the subspace was learned or a quantised copy of them; other weights are refused. Where C is columns of a quantised
base (``factors="learned_rows"``), ``tcurlora_col.<stack>`` holds it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcurlora_ext.adapter.options import LEARNED, LEARNED_ROWS, WEIGHTS
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.factors import take_factors
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.adapter.subspace.files import DAMAGE, from_tensors
from tcurlora_ext.maths.selection import Selection

from .config import TcurLoraConfig
from .indices import base_weights, layers_of, saved_key, stack_key
from .sharing import FACTORS

if TYPE_CHECKING:
    from .model import TcurLoraModel

SIDES = ("left", "right")
DESCRIPTION = "base_model.tcurlora_subspace"


def new_subspace(config: TcurLoraConfig, known: dict[str, Subspace]) -> Subspace | None:
    """The subspace of a new adapter; None where factors are not learned, or a checkpoint is still to bring it.

    Args:
        config: The adapter's configuration, with a subspace, or with the digest of one.
        known: Those of the model's other adapters, which may have this digest.

    Raises:
        ValueError: Factors are learned, and the configuration has neither.
    """
    found = config.read_subspace()
    if found is None and config.factors != WEIGHTS:
        raise ValueError(
            f"factors is {config.factors!r} and subspace None, expected the result of learn_factors(model, config, "
            "step), or the path of its file"
        )
    if isinstance(found, str):
        return next((subspace for subspace in known.values() if subspace.digest == found), None)
    return found


def require_factors(config: TcurLoraConfig, adapter_name: str, subspace: Subspace | None) -> None:
    """Raise ValueError for an adapter whose learned factors no checkpoint has brought."""
    if config.factors != WEIGHTS and subspace is None:
        raise ValueError(
            f"adapter {adapter_name} has no factors yet: its configuration, read from a checkpoint, has the digest "
            f"{str(config.subspace_digest)[:12]} of its subspace alone. Load the checkpoint, or set "
            "config.subspace to the subspace before the adapter is added"
        )


def with_subspace(tuner: TcurLoraModel, adapter_name: str, state: dict[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """The state to save, with the subspace in place of C and R.

    Args:
        tuner: Holds the adapter.
        adapter_name: The adapter.
        state: Its tensors as PEFT saves them.
        whole: Whether to save the directions, too.
    """
    subspace = tuner.subspaces[adapter_name]
    state = dict(state)
    for name, stack in tuner.stacks(adapter_name).items():
        # Another loading of a quantised base need not quantise it to the same bits.
        kept = ("col",) if stack.options.factors == LEARNED_ROWS and _is_quantised(tuner, stack) else ()
        for kind in FACTORS:
            if kind not in kept:
                state.pop(stack_key(adapter_name, name, kind), None)
    described: dict[str, Any] = {"digest": subspace.digest}
    if whole:
        described["subspace"] = subspace.header()
        for key, tensor in subspace.tensors().items():
            side, _, name = key.partition(".")
            state[stack_key(adapter_name, name, side)] = tensor
    state[DESCRIPTION] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return state


def without_directions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint without what it has of a subspace."""
    starts = tuple(saved_key("", side) for side in SIDES)
    return {key: value for key, value in state.items() if key != DESCRIPTION and not key.startswith(starts)}


def with_learned(tuner: TcurLoraModel, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`with_subspace`: C and R are decoded for the model's base weights.

    Raises ValueError where the subspace is damaged or missing, or was learned on other base weights.
    """
    state = dict(state)
    text = state.pop(DESCRIPTION, None)
    coded = {}
    for side in SIDES:
        start = saved_key("", side)
        for key in [key for key in state if key.startswith(start)]:
            coded[f"{side}.{key.removeprefix(start)}"] = state.pop(key)
    if text is None:
        return state
    decoded = dict(tuner.subspaces)
    tuner.subspaces[adapter_name] = subspace = _subspace(tuner, adapter_name, text, coded)
    same = [other for other, known in decoded.items() if known.digest == subspace.digest]
    for name, stack in tuner.stacks(adapter_name).items():
        columns = state.get(stack_key(adapter_name, name, "columns"), stack.columns)
        present = _decoded_already(stack, [one for other in same for one in tuner.stacks(other).values()])
        factors = present or _factors(tuner, adapter_name, stack, columns, subspace)
        for kind, factor in factors.items():
            state.setdefault(stack_key(adapter_name, name, kind), factor)
    return state


def _decoded_already(stack: TCURStack, others: list[TCURStack]) -> dict[str, Tensor] | None:
    """C and R of the first other stack over the same subspace that has them; None where C is not learned."""
    for other in others:
        alike = (other.names, other.rank, other.row.dtype) == (stack.names, stack.rank, stack.row.dtype)
        if alike and stack.options.factors == other.options.factors == LEARNED and not other.row.is_meta:
            return {kind: getattr(other, kind) for kind in FACTORS}
    return None


def _subspace(tuner: TcurLoraModel, adapter_name: str, text: Tensor, coded: dict[str, Tensor]) -> Subspace:
    """The subspace of a checkpoint: the one in it, or the one of its digest that the model has."""
    where = Path(f"adapter {adapter_name}")
    try:
        described = json.loads(bytes(text.cpu().tolist()))
        digest, header = str(described["digest"]), described.get("subspace")
    except DAMAGE as error:
        raise ValueError(f"{where}: the description of its subspace is damaged: {error!r}") from None
    own = tuner.subspaces.get(adapter_name)
    if own is not None and own.digest != digest:
        raise ValueError(f"{where} is over the subspace {digest[:12]}, found {own.digest[:12]} in its configuration")
    found = next((subspace for subspace in tuner.subspaces.values() if subspace.digest == digest), None)
    if found is not None:
        return found
    if header is None:
        raise ValueError(
            f"{where} is the cores over the subspace {digest[:12]}, which is not in the checkpoint; expected it in the "
            "configuration: config = TcurLoraConfig.from_pretrained(path), config.subspace = Subspace.load(file), and "
            "PeftModel.from_pretrained(base, path, config=config)"
        )
    return from_tensors(where, header, {key: tensor.cpu() for key, tensor in coded.items()}, digest)


@torch.no_grad()
def _factors(
    tuner: TcurLoraModel, adapter_name: str, stack: TCURStack, columns: Tensor, subspace: Subspace
) -> dict[str, Tensor]:
    """C and R of a stack, folded."""
    base = base_weights(tuner, stack, adapter_name)
    exact = not _is_quantised(tuner, stack)
    if base.is_meta:
        if stack.options.factors == LEARNED_ROWS:
            raise ValueError(f"{stack.names[0]}: C is columns of the base weights, which are on meta")
        base, exact = torch.zeros((), dtype=base.dtype).expand(base.shape), False
    config = tuner.peft_config[adapter_name].for_stack(stack.rank, 1.0)
    try:
        learned = subspace.factors(stack.names, stack.rank, base, config, exact)
    except ValueError as error:
        raise ValueError(f"adapter {adapter_name}: {error}") from None
    none = torch.zeros(0, dtype=torch.int64, device=base.device)
    columns = columns.to(base.device)
    chosen = Selection(none, columns, none.double(), torch.zeros(len(columns), dtype=torch.float64))
    taken = take_factors(base, chosen, stack.options, learned)
    return dict(zip(FACTORS, (taken.col, taken.row), strict=True))


def _is_quantised(tuner: TcurLoraModel, stack: TCURStack) -> bool:
    return any(layer.quantization_backend is not None for layer in layers_of(tuner, stack))
