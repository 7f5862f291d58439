"""The adapters that a bank holds, under one lock: names, handles, slots, what trains, and what is on the device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.options import positive

from .store import Adapter, Cores, Slot, Store

# How long a batch waits for room on the device that batches of other threads take, in seconds, and how often it looks.
PATIENCE, INTERVAL = 10.0, 0.02
T = TypeVar("T")


class Holding:
    """The adapters of a bank. Every method takes the lock.

    Args:
        like, start: As of :class:`Store`.
        capacity, pool: As of :class:`tcurlora_ext.AdapterBank`.
    """

    def __init__(
        self, like: Mapping[str, Tensor], start: Mapping[str, Tensor], capacity: int | None, pool: str | None
    ) -> None:
        if capacity is not None:
            positive("capacity", capacity)
        if pool not in (None, "cpu"):
            raise ValueError(f"pool is {pool!r}, expected None or 'cpu'")
        if pool is not None and capacity is None:
            raise ValueError("pool is 'cpu' without a capacity: expected the number of adapters that the device holds")
        self._capacity = capacity
        self._pool = None if pool is None else Store(like, start, torch.device("cpu"), None)
        # Without a pool the capacity counts adapters: cores that batches still use after replace are held beside them.
        self._store = Store(like, start, None, None if pool is None else capacity)
        self._reads_in_place = bool(start)  # whether batches read more than copies
        self._adapters: dict[str, Adapter] = {}
        self._by_handle: dict[int, Adapter] = {}
        self._handles = self._clock = 0
        self._changed = threading.Condition(threading.RLock())
        # Slots of batches that autograd has let go of. A finaliser may run anywhere, also within this lock: it only
        # appends here, which needs none.
        self._let_go: deque[list[Slot]] = deque()
        self.release_later = self._let_go.append

    @property
    def nbytes(self) -> int:
        """The bytes of all segments."""
        with self._changed:
            return self._store.nbytes + (0 if self._pool is None else self._pool.nbytes)

    def names(self) -> list[str]:
        """The names in the order in which they were added."""
        with self._changed:
            return list(self._adapters)

    def has(self, name: object) -> bool:
        """Whether there is an adapter of this name."""
        with self._changed:
            return name in self._adapters

    def _get(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(list(self._adapters)[:4]) or "none"
            raise ValueError(f"adapter {name!r} is not in the bank; it has {len(self._adapters)} ({known})")
        return self._adapters[name]

    def find(self, asked: Iterable[str | int]) -> list[Adapter]:
        """The adapters of names or handles. Raises ValueError for unknown ones."""
        with self._changed:
            return [self._get(one) if isinstance(one, str) else self._get_by_handle(one) for one in asked]

    def _get_by_handle(self, handle: int) -> Adapter:
        found = self._by_handle.get(handle)
        if found is None:
            raise ValueError(f"adapter {handle!r} is not in the bank: expected -1, the base, or a handle of add")
        return found

    # -- what changes --------------------------------------------------------------------------------------------------

    def add(self, sources: Mapping[str, Cores | None]) -> list[int]:
        """Add adapters: name -> cores, None for zeros, and what is beside them. Returns their handles."""
        with self._changed:
            self._drain()
            there = next((name for name in sources if name in self._adapters), None)
            if there is not None:
                raise ValueError(f"adapter {there!r} is in the bank already: use replace, or another name")
            total = len(self._adapters) + len(sources)
            if self._pool is None and self._capacity is not None and total > self._capacity:
                raise ValueError(
                    f"the bank holds {len(self._adapters)} adapters and gets {len(sources)} more, its capacity is "
                    f"{self._capacity}: remove some, or make it with pool='cpu'"
                )
            added = []
            for name, cores in sources.items():
                adapter = Adapter(name, self._handles)
                self._handles += 1
                self._put(adapter, cores)
                self._adapters[name] = self._by_handle[adapter.handle] = adapter
                added.append(adapter.handle)
            return added

    def _put(self, adapter: Adapter, cores: Cores | None) -> None:
        """Write an adapter's cores where no batch reads: to the pool, or without one, or to train, to the device."""
        slot = self._free_slot(adapter) if self._pool is None or adapter.parameters else None
        home = None if self._pool is None else self._taken(self._pool)
        for store, place in ((self._store, slot), (self._pool, home)):
            if store is not None and place is not None:
                store.write(place, cores)
        self._retire(adapter)
        adapter.slot, adapter.home = slot, home
        if adapter.parameters and slot is not None:
            for stack, view in self._store.views(slot).items():
                adapter.parameters[stack].data = view

    @staticmethod
    def _taken(store: Store) -> Slot:
        slot = store.take()
        assert slot is not None  # the store has no limit
        return slot

    def replace(self, name: str, cores: Cores | None) -> None:
        """Give an adapter other cores, in another slot."""
        with self._changed:
            self._drain()
            adapter = self._get(name)
            self._put(adapter, cores)
            if self._by_handle.get(adapter.handle) is not adapter:  # removed while this waited for room
                self._retire(adapter)
                raise ValueError(f"adapter {name!r} is not in the bank any more")

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        with self._changed:
            self._drain()
            adapter = self._get(name)
            self._end_training(adapter)
            del self._adapters[name], self._by_handle[adapter.handle]
            self._retire(adapter)

    def _retire(self, adapter: Adapter) -> None:
        """Let go of an adapter's places; batches that read them keep them until they end."""
        if adapter.slot is not None:
            self._store.retire(adapter.slot)
        if adapter.home is not None and self._pool is not None:
            self._pool.retire(adapter.home)
        self._changed.notify_all()

    def cores(self, names: Iterable[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Copies of the cores: adapter -> stack -> (S, c, r); and of what is beside them, by the parameters' names."""
        with self._changed:
            chosen = self._adapters.values() if names is None else [self._get(name) for name in names]
            return {
                adapter.name: {stack: core.clone() for stack, core in self._present(adapter).items()}
                for adapter in chosen
            }

    def _present(self, adapter: Adapter) -> dict[str, Tensor]:
        """The newest cores: what trains, or was never in the pool, is on the device."""
        if adapter.home is None or (adapter.parameters and adapter.slot is not None):
            assert adapter.slot is not None
            return self._store.views(adapter.slot)
        assert self._pool is not None
        return self._pool.views(adapter.home)

    # -- batches -------------------------------------------------------------------------------------------------------

    def acquire(self, adapters: Sequence[Adapter]) -> tuple[Store, list[Slot], dict[int, dict[str, nn.Parameter]]]:
        """Slots with the present cores of a batch's adapters, not written until released; and what of them trains."""
        if self._pool is not None and self._capacity is not None and len(adapters) > self._capacity:
            raise ValueError(
                f"the batch has {len(adapters)} different adapters, the capacity of the device is {self._capacity}"
            )
        with self._changed:
            slots = self._once_there_is_room(lambda: self._slots_of(adapters), lambda: f"{len(adapters)} adapters")
            # Not copied: thousands of new dictionaries per batch make the garbage collector run.
            trained = {at: adapter.parameters for at, adapter in enumerate(adapters) if adapter.parameters}
            return self._store, slots, trained

    def _slots_of(self, adapters: Sequence[Adapter]) -> list[Slot] | None:
        """The slots of all these adapters, acquired; None where the device has no room for one of them now."""
        gone = next((a for a in adapters if self._by_handle.get(a.handle) is not a), None)
        if gone is not None:
            raise ValueError(f"adapter {gone.name!r} is not in the bank any more")
        self._clock += 1
        for adapter in adapters:
            adapter.used = self._clock
        # Those that are on the device first: no other one takes their slots then.
        slots = [adapter.slot for adapter in adapters if adapter.slot is not None]
        self._store.acquire(slots)
        if len(slots) == len(adapters):
            return slots
        for adapter in adapters:
            if adapter.slot is None:
                slot = self._bring(adapter)
                if slot is None:
                    self._store.release(slots)
                    return None
                self._store.acquire([slot])
                slots.append(slot)
        return [adapter.slot for adapter in adapters if adapter.slot is not None]

    def _bring(self, adapter: Adapter) -> Slot | None:
        """Copy an adapter's cores from the pool to the device, where there is room."""
        slot = self._room()
        if slot is not None and self._pool is not None and adapter.home is not None:
            self._store.write(slot, self._pool.views(adapter.home))
            adapter.slot = slot
        return slot

    def _room(self) -> Slot | None:
        """A free slot of the device, for which the adapter that was used longest ago may have to leave."""
        slot = self._store.take()
        if slot is not None:
            return slot
        idle = [a for a in self._adapters.values() if a.slot is not None and not a.slot.users and not a.parameters]
        if not idle:
            return None
        oldest = min(idle, key=lambda adapter: adapter.used)
        slot, oldest.slot = oldest.slot, None
        return slot

    def _free_slot(self, adapter: Adapter) -> Slot:
        return self._once_there_is_room(self._room, lambda: f"adapter {adapter.name!r}")

    def _once_there_is_room(self, attempt: Callable[[], T | None], who: Callable[[], str]) -> T:
        """Repeat an attempt while batches of other threads fill the device; it changes nothing where it returns None.

        The lock is free between attempts, so that those batches can end.
        """
        end = time.monotonic() + PATIENCE
        while True:
            self._drain()
            found = attempt()
            if found is not None:
                return found
            if time.monotonic() > end:
                raise ValueError(
                    f"no room on the device for {who()}: the {self._capacity} that it holds train, or are used by "
                    "running batches or by backward passes that are still to come"
                )
            self._changed.wait(INTERVAL)

    def release(self, slots: list[Slot]) -> None:
        """The end of :meth:`acquire`."""
        with self._changed:
            self._store.release(slots)
            self._drain()
            self._changed.notify_all()

    def _drain(self) -> None:
        while self._let_go:
            self._store.release(self._let_go.popleft())

    # -- training ------------------------------------------------------------------------------------------------------

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's cores, and what it has beside them, as parameters in the memory of its slot."""
        with self._changed:
            self._drain()
            adapter = self._get(name)
            if not adapter.parameters:
                if self._reads_in_place and adapter.slot is not None and adapter.slot.users:
                    self._move(adapter)
                (slot,) = self._once_there_is_room(lambda: self._slots_of([adapter]), lambda: f"adapter {name!r}")
                adapter.parameters = {stack: nn.Parameter(view) for stack, view in self._store.views(slot).items()}
                self._store.release([slot])
            return dict(adapter.parameters)

    def _move(self, adapter: Adapter) -> None:
        """Let an adapter have another slot, where it trains while batches go on reading the present one."""
        slot = self._free_slot(adapter)
        here = self._by_handle.get(adapter.handle) is adapter
        if not here or adapter.slot is None or not adapter.slot.users:  # so while this waited for room
            self._store.retire(slot)
            return
        self._store.write(slot, self._store.views(adapter.slot))
        self._store.retire(adapter.slot)
        adapter.slot = slot

    def stop_training(self, name: str) -> None:
        """Let go of an adapter's parameters."""
        with self._changed:
            self._end_training(self._get(name))

    def _end_training(self, adapter: Adapter) -> None:
        if not adapter.parameters:
            return
        if adapter.home is not None and self._pool is not None:
            self._pool.write(adapter.home, self._present(adapter))
        for parameter in adapter.parameters.values():
            parameter.data = parameter.data.clone()  # its slot may become another adapter's
        adapter.parameters = {}
