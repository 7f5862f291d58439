"""Writing files so that a kill at any moment leaves the last good one.

A temporary file is filled in the target's own folder, flushed to disk and renamed over the target: the rename is atomic
within one file system, so a reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block it is flushed and renamed to `path`.

    An exception inside the block removes the temporary file and leaves `path` as it was.
    The temporary name keeps the suffix, because writers choose a format by it, and has the process in it, so that two
    processes that write one file do not tear it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.split(".", 1)
    temporary = path.with_name(f".{name[0]}.{os.getpid()}.partial" + (f".{name[1]}" if len(name) > 1 else ""))
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself has to reach the disk too
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_with(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer(temporary_path)` write a file that then becomes `path`, atomically."""
    with replacing(path) as temporary:
        writer(temporary)
