"""Two processes by torchrun, over gloo on the CPU: one run for all cases, which have the checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tcurlora_ext as tcur

from . import run  # noqa: F401  # fills CASES
from .cases import CASES
from .network import adapted, base

TESTS = Path(__file__).parents[2]
PACKAGE = Path(tcur.__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case found in all processes: nothing, or what went wrong."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, (str(TESTS), str(PACKAGE), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [*command, "-m", "integrations.processes.run", str(folder)], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    texts = {}
    for name in CASES:
        files = sorted(folder.glob(f"{name}-*.txt"))
        texts[name] = "\n".join(file.read_text() for file in files).strip() if len(files) == 2 else ran.stderr[-4000:]
    texts["exit"] = "" if ran.returncode == 0 else ran.stderr[-4000:]
    return texts


@pytest.mark.parametrize("case", [*CASES, "exit"])
def test_two_processes_agree_with_one(case: str, found: dict[str, str]) -> None:
    assert not found[case], found[case]


def test_wrong_blocks_and_models_are_refused_before_anything_is_sharded() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="blocks: found a Block that is not within Network"):
        tcur.shard(model, adapted().blocks)
    with pytest.raises(ValueError, match=r"Network is not adapted; call inject\(model\) first"):
        tcur.shard(base(), [])
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is merged: call unmerge\(model\) before shard"):
        tcur.shard(tcur.merge(model), model.blocks)
