"""The batch of many adapters that is running, by which a stack takes other cores than its own.

:class:`tcurlora_ext.AdapterBank` enters a batch around the calls of a model. It is kept in a context variable: threads
do not see each other's batches.

Activation checkpointing calls layers again in the backward pass: then no batch is entered any more, or that of another
forward pass, and perhaps it is another thread. So a batch also puts a mark on whatever autograd saves while it is
entered, by hooks on saved tensors that leave the tensors alone. Checkpointing saves the inputs of what it will compute
again (``torch.utils.checkpoint`` in both forms), and unpacks them right before: the mark that the backward pass has met
last is the batch of the forward pass that is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

FORWARD = -1  # what PyTorch returns for the number of the backward pass outside of one


class Batch(Protocol):
    """What computes the layers of some stacks while it is entered.

    Attributes:
        marked: Whether autograd has saved a tensor under this batch, and so keeps it.
    """

    marked: bool

    @property
    def stacks(self) -> Collection[Any]:
        """The stacks, one object for all batches of a bank."""

    def adapt(
        self, stack: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: int, number: int, training: bool, /
    ) -> Tensor | None:
        """As :meth:`tcurlora_ext.TCURStack.adapt`; None where the stack is to use its own core."""

    def beside(self, module: Any, x: Tensor, /) -> Tensor | None:
        """What a module beside the stacks makes of x; None where it is to use its own parameters."""


@dataclass
class _Backward:
    """A running backward pass of this thread, and the batches whose marks it has met, the last one last."""

    number: int
    met: dict[int, Batch] = field(default_factory=dict)
    running: bool = True

    def end(self) -> None:
        self.running = False
        self.met.clear()


class _Backwards(threading.local):
    def __init__(self) -> None:
        self.passes: list[_Backward] = []  # inner ones last: reentrant checkpointing starts one within another

    def drop_ended(self) -> None:
        while self.passes and not self.passes[-1].running:
            self.passes.pop()


_entered: ContextVar[tuple[tuple[Batch, int], ...]] = ContextVar("tcurlora_batches", default=())
_backwards = _Backwards()


def _backward_number() -> int:
    return int(torch._C._current_graph_task_id())


@contextmanager
def entered(batch: Batch) -> Iterator[None]:
    """Let the batch compute the layers of its stacks inside the block; of two around each other, the inner one."""
    number = _backward_number()
    token = _entered.set((*_entered.get(), (batch, number)))
    try:
        with _marks(batch, number):
            yield
    finally:
        _entered.reset(token)


def _marks(batch: Batch, entered_in: int) -> saved_tensors_hooks:
    """Hooks that mark saved tensors, around those that are there already, of which PyTorch calls the innermost only."""
    there: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    there = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        # A backward pass within the block may compute layers of another batch again: those tensors get no mark.
        own = _backward_number() == entered_in
        batch.marked = True
        # Detached: a saved output that is returned as it is would keep its graph alive.
        return own, tensor.detach() if there is None else there[0](tensor)

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        own, saved = packed
        tensor = saved if there is None else there[1](saved)
        if own:
            _meet(batch)
        return tensor

    return saved_tensors_hooks(pack, unpack)


def _meet(batch: Batch) -> None:
    """Note that the running backward pass uses what was saved under this batch."""
    number = _backward_number()
    if number == FORWARD:
        return
    _backwards.drop_ended()
    passes = _backwards.passes
    if not passes or passes[-1].number != number:
        passes.append(_Backward(number))
        Variable._execution_engine.queue_callback(passes[-1].end)
    met = passes[-1].met
    met.pop(id(batch.stacks), None)
    met[id(batch.stacks)] = batch


def batch_of(stack: Any) -> Batch | None:
    """The batch that computes a stack's layers now; None where the stack uses its own core.

    Args:
        stack: The :class:`tcurlora_ext.TCURStack`.

    Raises:
        RuntimeError: A layer is computed again in a backward pass, and nothing tells for which batch.
    """
    number = _backward_number()
    for batch, since in reversed(_entered.get()):
        if since == number and stack in batch.stacks:
            return batch
    if number == FORWARD:
        return None
    _backwards.drop_ended()
    for batch in reversed(_backwards.passes[-1].met.values() if _backwards.passes else ()):
        if stack in batch.stacks:
            return batch
    if stack.batched:
        raise RuntimeError(
            f"{', '.join(stack.names[:3])}: computed again in a backward pass, and nothing tells for which batch of a "
            "bank. Enter bank.use(ids) around the whole forward pass and inside other hooks on saved tensors, and "
            "bank.use(None) where the model's own adapter trains; or pass context_fn=bank.checkpoint_context to "
            "torch.utils.checkpoint"
        )
    return None


def adapted_by_batch(
    stack: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: int, number: int, training: bool
) -> Tensor | None:
    """What the running batch makes of a layer's call; None where the stack uses its own core."""
    if torch.compiler.is_compiling():
        return _outside_the_graph(stack, x, weight, bias, first, number, training)
    batch = batch_of(stack)
    return None if batch is None else batch.adapt(stack, x, weight, bias, first, number, training)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_the_graph(*call: Any) -> Tensor | None:
    # A function of its own: what disables compilation takes microseconds, which a layer of a few tokens feels.
    return adapted_by_batch(*call)


def beside_by_batch(stack: Any, module: Any, x: Tensor) -> Tensor | None:
    """What the running batch of a model makes of a call of a module that each adapter has for itself.

    Args:
        stack: Any stack of the model.
        module: The module.
        x: Its input.

    Returns:
        Its output; None where the module uses its own parameters.
    """
    if torch.compiler.is_compiling():
        return _beside_outside_the_graph(stack, module, x)
    batch = batch_of(stack)
    return None if batch is None else batch.beside(module, x)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _beside_outside_the_graph(*call: Any) -> Tensor | None:
    return beside_by_batch(*call)
