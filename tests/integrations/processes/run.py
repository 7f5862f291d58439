"""Cases in which two processes have to agree with one; test_processes.py starts this by torchrun.

    PYTHONPATH=tests torchrun --nproc-per-node 2 -m integrations.processes.run FOLDER

Every case runs in both processes. Each writes a traceback, or nothing, to FOLDER/<case>-<rank>.txt.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from . import ddp, fsdp, learned, trainer  # noqa: F401  # their cases
from .cases import CASES


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, function in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            function(folder / name)
            found = ""
        except Exception:
            found = traceback.format_exc()
        (folder / f"{name}-{distributed.get_rank()}.txt").write_text(found)
        # Processes that failed at different places would wait for each other from here on.
        failed = torch.tensor(float(bool(found)))
        distributed.all_reduce(failed)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # FSDP2 over gloo sometimes aborts as the interpreter ends ("terminate called without an active exception"), also
    # in a program of plain linear layers without this package; all is written by now.
    os._exit(0)
