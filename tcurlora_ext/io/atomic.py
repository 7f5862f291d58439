"""Writing files atomically: a process killed at any moment leaves the old file or the new one, never a part of one.

A temporary file in the target's folder is written, flushed to disk and renamed to the target; a rename within one file
system is atomic. What a killed process left of it goes when the same file is written again.
"""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for the block to write; then flush the file and rename it to `path`.

    An exception inside the block removes the temporary file and leaves `path` as it was. The temporary name keeps the
    suffix, because writers choose a format by it, and contains the process id, so that two processes that write the
    same file use two temporary ones.

    Raises:
        OSError: The system refuses the folder or the file (no permission, no space). It names `path`, which is as it
            was, and has the system's error number.
    """
    start, dot, suffix = path.name.partition(".")
    temporary = path.with_name(f".{start}.{os.getpid()}.partial{dot}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path.parent, f".{glob.escape(start)}.*.partial{glob.escape(dot + suffix)}")
        try:
            with temporary.open("wb") as held:
                _lock(held)
                yield temporary
                with temporary.open("rb") as written:  # a writer may have made another file of this name
                    os.fsync(written.fileno())
                temporary.replace(path)
        finally:
            with suppress(OSError):  # what stopped the writing is the error to show
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _naming(path, temporary, error) from error
    with suppress(OSError):  # some network file systems do not sync a folder; the file is complete all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the rename is on disk too
        finally:
            os.close(folder)


def _lock(file: IO[bytes]) -> None:
    """Hold the file's lock while it is open; the system releases it when the process ends, however it ends."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _clear_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files that no process holds any more."""
    for leftover in folder.glob(pattern):
        with suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError while a process writes it
            leftover.unlink()


def _naming(path: Path, temporary: Path, error: OSError) -> OSError:
    """The same error for the file that the user knows, in place of the temporary one."""
    reason = error.strerror or str(error)
    if error.filename is not None and Path(os.fsdecode(error.filename)) not in (path, temporary):
        reason += f" at {os.fsdecode(error.filename)}"
    reason += "; the file is not written, and an earlier one is as it was"
    return OSError(f"{path}: {reason}") if error.errno is None else OSError(error.errno, reason, str(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_with(path: Path, writer: Callable[[Path], Any]) -> None:
    """Call `writer` with a temporary path, and make the file that it writes there `path`, atomically."""
    with replacing(path) as temporary:
        writer(temporary)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder. None of them gets its name before all are complete on disk.

    They are renamed one after the other, in the order given. Other files of the folder stay. Where the folder is new
    and the writing fails, it is removed again.

    Args:
        folder: The folder; it is created where it is missing.
        contents: The content of each file by the file's name.

    Raises:
        OSError: Of :func:`replacing`.
    """
    new = not folder.exists()
    try:
        with ExitStack() as files:
            # the last one that is entered is renamed first
            for name, content in reversed(list(contents.items())):
                with files.enter_context(replacing(folder / name)).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
    except BaseException as error:
        if new:
            with suppress(OSError):  # a file in it that was complete, or of another process
                folder.rmdir()
        if isinstance(error, OSError):
            raise _named_first(error) from None
        raise


def _named_first(error: OSError) -> OSError:
    """The error for the file that failed, without what the files around it have made of it."""
    while isinstance(error.__cause__, OSError) and isinstance(error.__cause__.__cause__, OSError):
        error = error.__cause__
    return error
