"""The bank: adapters of one base by name, and the batches that use them."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.layer.carried import TCURCarried
from tcurlora_ext.adapter.layer.convolution import TCURConv
from tcurlora_ext.adapter.layer.parameter import TCURParameter
from tcurlora_ext.adapter.model.structure import require_adapted, stacks
from tcurlora_ext.adapter.stack.batches import batch_of, entered

from . import files
from .batch import AdapterBatch, OwnCores
from .holding import Holding
from .hooks import take_ids_from_calls
from .ids import Ids, Owners
from .modules import OwnModules
from .same import SameModel

Source = Mapping[str, Tensor] | nn.Module | None


class AdapterBank:
    """Adapters of one base, of which any number works in one batch: one per sample, or one per token.

    All of them share the rows and columns of the model's stacks, and so C and R; each has cores of its own, some
    hundreds or thousands of parameters. A batch computes all products as wide as a layer once, for all its adapters,
    and multiplies each token by the core of its own adapter in between. ``model(x, adapter_ids=["a", "b", "a"])``
    computes three samples; ``with bank.use(["a", "b", "a"]):`` does so for all calls of the model in its block.

    Without ids the model uses its own adapter, as before. Methods may be called from several threads, also while
    batches run in others: a batch works on the cores that the bank had when it began.

    Args:
        model: An adapted model (:func:`tcurlora_ext.inject`), on its device and in its dtype. Only its cores train,
            not its factors.
        capacity: The largest number of adapters on the device; None: any number.
        pool: ``"cpu"``: all adapters are held on the CPU, and the device holds ``capacity`` of them: those used last.
            None: all are held on the device.
        modules: The names of modules of which each adapter has its own weight and bias, such as a head that trains
            beside the cores: ``nn.Linear``, and ``nn.LayerNorm`` over the last dimension. The base, -1, has those of
            the model when the bank is made, and so do adapters that come without; without ids, the model's present
            ones compute.

    Raises:
        ValueError: The model is not adapted, is sharded over processes, has quantised layers, or trains C and R
            (``trainable="all"``); a module cannot be kept per adapter, by its name and with the reason, or holds what
            the model's own adapter has trained; ``capacity`` is not a positive number, or ``pool`` is another name or
            comes without a capacity.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int | None = None,
        pool: str | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        adapted = require_adapted(model)
        refuse_sharded(adapted.model, "make the bank before shard(model)")
        self._model = adapted.model
        self._stacks = stacks(adapted.model)
        for name, stack in self._stacks.items():
            if stack.options.trainable != "core":
                raise ValueError(
                    f"stack {name} trains C and R (trainable={stack.options.trainable!r}): adapters of a bank share "
                    "them and have cores alone"
                )
            if any(isinstance(layer, TCURCarried) for layer in stack.layers.values()):
                raise ValueError(f"stack {name} has quantised layers, whose own forward pass knows one adapter alone")
            if any(isinstance(layer, TCURParameter) for layer in stack.layers.values()):
                raise ValueError(
                    f"stack {name} has {stack.names[0]}, a parameter that the module around it reads: there the rows "
                    "are no longer those of the batch (experts, nn.MultiheadAttention); adapt the model without it"
                )
            if any(isinstance(layer, TCURConv) for layer in stack.layers.values()):
                raise ValueError(
                    f"stack {name} has convolutions ({stack.names[0]}, ...), expected linear layers: a batch of many "
                    "adapters has an adapter for each token, and convolutions mix tokens"
                )
        self._names = {stack: name for name, stack in self._stacks.items()}
        self._modules = OwnModules(adapted, modules)
        like = {name: stack.core.detach() for name, stack in self._stacks.items()} | self._modules.base
        self._held = Holding(like, self._modules.base, capacity, pool)
        self._same = SameModel(self._model, self._stacks)
        self._files = files.Checks(self._model, self._stacks, self._modules)
        for stack in self._stacks.values():
            stack.banked = True
        take_ids_from_calls(model, weakref.ref(self))
        self._modules.answer_to(self)

    # -- the adapters -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        return self._held.names()

    def __len__(self) -> int:
        return len(self._held.names())

    def __contains__(self, name: object) -> bool:
        return self._held.has(name)

    @property
    def nbytes(self) -> int:
        """How many bytes of memory hold the cores, on the device and, with a pool, on the CPU.

        They include what adapters have of their own ``modules``, and the base's of these.
        """
        return self._held.nbytes + self._modules.nbytes

    def add(self, name: str, source: Source = None) -> int:
        """Add an adapter.

        Args:
            name: Its name.
            source: Its cores: None for zeros; or stack -> core (S, c, r), in the stack's core domain; or an adapted
                model with the same rows, columns and scale, such as the bank's own, whose present cores are copied.
                With ``modules``, also their parameters by name, ``"head.weight"``; a model's present ones are copied.
                Those that are missing are the base's.

        Returns:
            A handle for ``ids``, a whole number from 0 that no other adapter of this bank ever has.

        Raises:
            ValueError: There is an adapter of this name, or no room for another one; or the cores do not fit, by the
                name of the stack; or another model has trained parameters beside the cores that are not of the bank's
                modules. Nothing is changed.
        """
        return self.add_all({name: source})[0]

    def add_all(self, sources: Mapping[str, Source]) -> list[int]:
        """As :meth:`add` for several adapters: all of them or, after an error, none.

        Args:
            sources: Name -> cores.
        """
        checked = {name: self._files.cores_of(name, source) for name, source in sources.items()}
        return self._held.add(checked)

    def replace(self, name: str, source: Source) -> None:
        """Give an adapter other cores. Its handle stays. Batches that run keep the old ones.

        Args:
            name: The adapter.
            source: As for :meth:`add`.

        Raises:
            ValueError: There is no such adapter, or the cores do not fit. Nothing is changed.
        """
        self._held.replace(name, self._files.cores_of(name, source))

    def remove(self, name: str) -> None:
        """Remove an adapter. Batches that run keep its cores.

        Args:
            name: The adapter; ValueError where there is none of this name.
        """
        self._held.remove(name)

    def cores(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's cores: stack -> (S, c, r), in the stack's core domain.

        With ``modules``, also of its own parameters of these, by name, such as ``"head.weight"``.

        Args:
            name: The adapter.

        Raises:
            ValueError: There is no such adapter.
        """
        return self._held.cores([name])[name]

    # -- files --------------------------------------------------------------------------------------------------------

    def load(self, path: str | os.PathLike[str], name: str | None = None) -> int:
        """Add the adapter of a file that :func:`tcurlora_ext.save_adapter` wrote.

        Args:
            path: The file, or its folder.
            name: The adapter's name; None: that of the file without its suffix.

        Returns:
            The handle, as of :meth:`add`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, was trained on other base weights, or has other stacks, rows, columns,
                rank, scale, transform or core domain than the model, by the name of the stack; or it has trained
                parameters beside the cores that are not of the bank's modules, or running statistics, which all samples
                would share; or as of :meth:`add`.
        """
        cores, found = self._files.read(path)
        return self.add(found if name is None else name, cores)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all adapters to one safetensors file. A file that is there is replaced when the new one is complete.

        Args:
            path: The file. Missing parents are created.

        Returns:
            The path.

        Raises:
            ValueError: A core is not finite. No file is written.
            OSError: The file cannot be written.
        """
        return self._files.write(Path(path), self._held.cores())

    def load_all(self, path: str | os.PathLike[str]) -> list[str]:
        """Add all adapters of a file of :meth:`save`, or after an error none.

        Args:
            path: The file.

        Returns:
            The names of the adapters.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: As of :meth:`load`, for the whole file; or one of the names is in the bank already.
        """
        cores = self._files.read_all(Path(path))
        self.add_all(cores)
        return list(cores)

    # -- use ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, ids: Ids | None) -> Iterator[None]:
        """Within this block, calls of the model in this thread compute each sample, or token, with its own adapter.

        A backward pass may come after the block. What activation checkpointing computes again in it has the adapters
        of its own forward pass.

        Args:
            ids: Names or handles, -1 for the base without adapter. One per sample, a sequence or tensor (N,): the
                layers' inputs have N as their first dimension, or a multiple of it, each sample's rows one after the
                other (beams, windows). Or one per token: a tensor of handles in the shape of the layers' inputs without
                the last dimension. None: the model's own adapter.

        Raises:
            ValueError: An adapter is not in the bank, or a layer is merged; base weights with other rows and columns
                were loaded; the model was moved to another device; or the device has no room for all adapters of the
                batch. In the block, a layer's call raises it where the ids do not fit its input.
            TypeError: ``ids`` is one name, or not of whole numbers.

        Warns:
            UserWarning: No adapted layer was called in the block, or one of the bank's modules was not.
        """
        batch = self._batch(ids)
        try:
            with entered(batch):
                yield
        finally:
            self._end(batch)
        if not batch.used:
            warnings.warn(
                "no adapted layer of the bank's model was called within bank.use: the ids had no effect", stacklevel=3
            )
        elif isinstance(batch, AdapterBatch) and len(batch.called) < len(self._modules.names):
            left = [name for name in self._modules.names if name not in batch.called]
            warnings.warn(
                f"{', '.join(left)}: not called within bank.use, so that those of the adapters had no effect. A parent "
                "may read the weight itself, as nn.TransformerEncoderLayer does in eval mode",
                stacklevel=3,
            )

    def _batch(self, ids: Ids | None) -> AdapterBatch | OwnCores:
        self._same.require()
        self._modules.require()
        if torch.is_grad_enabled():
            for stack in self._stacks.values():
                stack.batched = True
        if ids is None:
            return OwnCores(self._names)
        owners = Owners(ids, self._held.find)
        store, slots, trained = self._held.acquire(owners.adapters)
        return AdapterBatch(self._names, owners, store, slots, trained, self._modules)

    def _end(self, batch: AdapterBatch | OwnCores) -> None:
        """Let the batch's slots be written again: now, or once autograd has let go of what it saved."""
        if isinstance(batch, OwnCores):
            return
        if batch.marked:
            weakref.finalize(batch, self._held.release_later, batch.slots).atexit = False
        else:
            self._held.release(batch.slots)

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For ``torch.utils.checkpoint(..., use_reentrant=False, context_fn=bank.checkpoint_context)``: explicit ids.

        It is needed only where other hooks on saved tensors are entered within :meth:`use`; an error says so.

        Returns:
            Two context managers, for the forward pass and for what is computed again, where the batch is the same.
        """
        batch = batch_of(next(iter(self._stacks.values()))) or OwnCores(self._names)
        batch.marked = True  # it is needed after its block
        return nullcontext(), entered(batch)

    # -- training -----------------------------------------------------------------------------------------------------

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's cores as parameters, for an optimizer: stack -> (S, c, r), in the bank's memory.

        With ``modules``, also its own parameters of these, by name.

        From now on the adapter trains: batches in grad mode give these parameters gradients where the adapter is in
        the batch, and leave them None where it is not. It stays on the device, also with a pool.

        Args:
            name: The adapter.

        Raises:
            ValueError: There is no such adapter, or the device has no room for it.
        """
        return self._held.parameters_of(name)

    def train(self, names: Iterable[str] | None = None, mode: bool = True) -> list[nn.Parameter]:
        """The parameters of some adapters, which train from now on; or end that.

        Args:
            names: The adapters; None: all.
            mode: False: they do not train any more; their parameters are no longer the bank's, and none is returned.

        Raises:
            ValueError: There is no such adapter, or the device has no room for all of them.
        """
        chosen = self.names if names is None else list(names)
        if isinstance(names, str):
            raise TypeError(f"names is {names!r}, expected a list of names")
        if not mode:
            for name in chosen:
                self._held.stop_training(name)
            return []
        return [parameter for name in chosen for parameter in self._held.parameters_of(name).values()]
