"""Run in a new process: loads adapters that another process saved, and writes the outputs of the loaded models.

    PYTHONPATH=tests python -m integrations.elsewhere FOLDER

Every folder "FOLDER/<kind>, <entry>" has an adapter; the output for the examples is written to it as output.pt.
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
