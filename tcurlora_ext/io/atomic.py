"""Writing files atomically: a process killed at any moment leaves the old file or the new one, never a part of one.

A temporary file in the target's folder is written, flushed to disk and renamed to the target; a rename within one file
system is atomic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for the block to write; then flush the file and rename it to `path`.

    An exception inside the block removes the temporary file and leaves `path` as it was. The temporary name keeps the
    suffix, because writers choose a format by it, and contains the process id, so that two processes that write the
    same file use two temporary ones.
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
        os.fsync(folder)  # so that the rename is on disk too
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_with(path: Path, writer: Callable[[Path], Any]) -> None:
    """Call `writer` with a temporary path, and make the file that it writes there `path`, atomically."""
    with replacing(path) as temporary:
        writer(temporary)
