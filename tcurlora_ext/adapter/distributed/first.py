"""What the first process alone does for all processes, such as writing a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import distributed


def write_in_first(path: Path, write: Callable[[], object]) -> None:
    """Call ``write`` in the first process; every process calls this, and returns when the file is written.

    The first process tells the others how it ended: in a barrier they would wait for a process that has failed.

    Args:
        path: The file, for the message of the other processes.
        write: Writes it.

    Raises:
        OSError: In every process but the first, where ``write`` has failed in the first. It names the first's failure.
        Exception: In the first process, what ``write`` raises.
    """
    failed: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            write()
        except Exception as error:  # of any kind: the others have to hear of it before it is raised
            failed = error
    outcome = [None if failed is None else f"{type(failed).__name__}: {failed}"]
    distributed.broadcast_object_list(outcome, src=0)
    if failed is not None:
        raise failed
    if outcome[0] is not None:
        raise OSError(f"{path}: the first process could not write it ({outcome[0]})")
