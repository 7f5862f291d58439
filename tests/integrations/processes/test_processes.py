"""Two processes by torchrun, over gloo on the CPU: one run for all cases, which do the checks themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.testing import assert_close

import tcurlora_ext as tcur

from .. import small_models
from ..entries import ENTRIES, Entry
from . import run  # noqa: F401  # fills CASES
from .cases import CASES, name_of
from .network import adapted, base
from .trainer import KIND, STEPS, trainer_saves_what_every_process_has

TESTS = Path(__file__).parents[2]
PACKAGE = Path(tcur.__file__).parents[1]


class Ran(NamedTuple):
    folder: Path
    found: dict[str, str]  # what each case found in all processes: nothing, or what went wrong


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Ran:
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
    return Ran(folder, texts)


@pytest.mark.parametrize("case", [*CASES, "exit"])
def test_two_processes_agree_with_one(case: str, processes: Ran) -> None:
    assert not processes.found[case], processes.found[case]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_trainer_on_two_processes_trains_what_it_trains_on_one(entry: str, processes: Ran, tmp_path: Path) -> None:
    how = ENTRIES[entry]
    single = small_models.train(small_models.adapted(KIND, how), KIND, tmp_path, max_steps=STEPS)
    folder = processes.folder / name_of(trainer_saves_what_every_process_has, entry)
    expected = small_models.cores(how, single)
    for name, core in small_models.cores(how, how.load(small_models.base(KIND), folder)).items():
        assert bool(core.any())
        assert_close(core, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_wrong_blocks_and_models_are_refused_before_anything_is_sharded(entry: Entry) -> None:
    model = adapted(entry)
    with pytest.raises(ValueError, match=r"blocks: found a Block that is not within (Network|PeftModel)"):
        tcur.shard(model, adapted(entry).blocks)
    with pytest.raises(ValueError, match=r"Network is not adapted; call inject\(model\) or get_peft_model"):
        tcur.shard(base(), [])
    for name, module in model.named_modules():
        if name.endswith("blocks.0.attn.qkv"):
            module.merge()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is merged: unmerge the model before shard"):
        tcur.shard(model, model.blocks)
