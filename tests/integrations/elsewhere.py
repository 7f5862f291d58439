"""A new process that loads what another has saved, and writes what the loaded models compute.

    PYTHONPATH=tests python -m integrations.elsewhere FOLDER

FOLDER/<kind>, <entry> holds an adapter; the output to the examples goes into it as output.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .entries import ENTRIES
from .small_models import base, output

if __name__ == "__main__":
    for saved in Path(sys.argv[1]).iterdir():
        kind, entry = saved.name.split(", ")
        torch.save(output(ENTRIES[entry].load(base(kind), saved), kind), saved / "output.pt")
