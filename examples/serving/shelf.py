"""Adapters by name while requests use them: a request keeps the version that there was when it came."""

from __future__ import annotations

import difflib
import threading
from pathlib import Path

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur


def random_cores(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Cores that stand for trained ones: stack -> (S, c, r)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(stack.core.shape, generator=generator).to(stack.core)
        for name, stack in tcur.stacks(model).items()
    }


class Unknown(LookupError):
    """There is no adapter of that name."""


class Shelf:
    """Names of adapters, each with its present version in a bank.

    A bank's batch has the cores of the moment when it began, and each decoding step is a batch of its own. So that no
    request changes its adapter between two steps, where its cache would not fit the new one, a replaced or removed
    version stays in the bank until the last request that uses it has ended.

    Args:
        model: An adapted model.
        folder: Where adapter files are; None: only random adapters.
    """

    def __init__(self, model: nn.Module, folder: Path | None) -> None:
        self.bank = tcur.AdapterBank(model)
        self._model, self._folder = model, folder
        self._lock = threading.Lock()
        self._versions: dict[str, str] = {}  # name -> name of its version in the bank
        self._users: dict[str, int] = {}  # version -> requests that use it, and one while a name means it
        self._count = 0

    @property
    def names(self) -> list[str]:
        """The names, sorted."""
        with self._lock:
            return sorted(self._versions)

    def _version(self, name: str) -> str:
        if name not in self._versions:
            near = difflib.get_close_matches(name, self._versions) or sorted(self._versions)[:3]
            raise Unknown(
                f"no adapter {name!r}; there are {len(self._versions)} (near it: {', '.join(near) or 'none'})"
            )
        return self._versions[name]

    def take(self, name: str) -> str:
        """A name's present version, which stays in the bank until :meth:`let_go`. Raises Unknown."""
        with self._lock:
            version = self._version(name)
            self._users[version] += 1
            return version

    def let_go(self, version: str) -> None:
        """The end of :meth:`take`."""
        with self._lock:
            self._let_go(version)

    def _let_go(self, version: str) -> None:
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]
            self.bank.remove(version)

    def put(self, name: str, file: str | None, seed: int, new: bool) -> str:
        """Add an adapter, or replace one.

        Args:
            name: Its name.
            file: A file in the folder, written by ``tcur.save_adapter``; None: random cores.
            seed: The seed of random cores.
            new: Whether the name has to be new, or to be there.

        Returns:
            The version's name.

        Raises:
            Unknown: There is no such adapter to replace.
            ValueError: There is one already; the file is not in the folder, or does not fit the model.
            FileNotFoundError: There is no such file.
        """
        with self._lock:
            self._present(name, new)
            self._count += 1
            version = f"{name}#{self._count}"
        if file is None:
            self.bank.add(version, random_cores(self._model, seed))
        else:
            self.bank.load(self._path(file), version)  # without the lock, which requests take
        with self._lock:
            try:
                old = self._present(name, new)
            except (Unknown, ValueError):  # another client was faster
                self.bank.remove(version)
                raise
            self._versions[name], self._users[version] = version, 1
            if old is not None:
                self._let_go(old)
        return version

    def _present(self, name: str, new: bool) -> str | None:
        """The version that :meth:`put` replaces; raises where the name should be new and is not, or the reverse."""
        if not new:
            return self._version(name)
        if name in self._versions:
            raise ValueError(f"adapter {name!r} is there already: replace it with PUT /adapters/{name}")
        return None

    def _path(self, file: str) -> Path:
        if self._folder is None:
            raise ValueError("the server was started without --adapters FOLDER: no files can be loaded")
        path = (self._folder / file).resolve()
        if not path.is_relative_to(self._folder.resolve()):
            raise ValueError(f"{file!r} is outside the folder of adapters")
        return path

    def remove(self, name: str) -> None:
        """Remove a name. Requests that use its version end with it. Raises Unknown."""
        with self._lock:
            version = self._version(name)
            del self._versions[name]
            self._let_go(version)
