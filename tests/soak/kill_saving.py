"""Kills processes at random moments while they save: the last good file stays, and a resumed run ends as a whole one.

    python tests/soak/kill_saving.py 50 6 0       # kills of saving, kills of a fine-tuning run, seed

Saving: a process writes an adapter file and a checkpoint over and over, and is killed by SIGKILL. Both files must then
load and hold the last save that ended or the one after it, and the next save must leave nothing but the two files.
Fine-tuning: `tcurlora finetune` runs on the embedded data with tiny settings, is killed, and goes on with --resume.
Data, weights, adapter, scores and curves must then be those of a run that nothing interrupted. The exit code is 1 where
one of these fails.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.io.tensors import read_checkpoint, write_checkpoint

ADAPTER, CHECKPOINT, COUNTER = "adapter.safetensors", "checkpoint.pt", "saved.txt"
TINY = [
    "--method", "tcur", "--steps", "40", "--pretrain-steps", "20", "--checkpoint-every", "1", "--rank", "4",
    "--roi", "16", "--sizes", '{"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "features": 4}',
]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def save(model: nn.Module, number: int, folder: Path) -> None:
    """Save an adapter and a checkpoint in which every trained value is `number`."""
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            stack.core.fill_(number)
    tcur.save_adapter(model, folder / ADAPTER)
    write_checkpoint(folder / CHECKPOINT, {"step": number, "parameters": {"weight": torch.full((256, 256), number)}})


def save_for_ever(folder: Path) -> None:
    """What the process that is killed does. After each save it adds a line to a file, in one write of the system."""
    model = tcur.inject(network(), tcur.TCURConfig(rank=16, target_modules=["0", "1"]))
    counter = os.open(folder / COUNTER, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = 0
    while True:
        number += 1
        save(model, number, folder)
        os.write(counter, b"%d\n" % number)


def loaded(folder: Path) -> tuple[int, int]:
    """The numbers in the adapter file and in the checkpoint. ValueError where a file does not load or mixes saves."""
    model = tcur.load_adapter(network(), folder / ADAPTER)
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    cores = {float(value) for stack in tcur.stacks(model).values() for value in stack.core.detach().unique()}
    steps = {float(checkpoint["step"]), *map(float, checkpoint["parameters"]["weight"].unique())}
    if len(cores) != 1 or len(steps) != 1:
        raise ValueError(f"{folder}: values of several saves in one file, cores {cores}, checkpoint {steps}")
    return int(cores.pop()), int(steps.pop())


@dataclass
class Saving:
    """What the kills of saving processes left."""

    kills: int = 0
    saves: int = 0
    partial: int = 0
    failures: tuple[str, ...] = ()


def kill_savers(kills: int, draw: random.Random, folder: Path) -> Saving:
    """Kill a process that saves, `kills` times."""
    found = Saving()
    for kill in range(kills):
        (folder / COUNTER).write_bytes(b"")
        command = [sys.executable, str(Path(__file__).resolve()), "--save-to", str(folder)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            try:
                while process.poll() is None and not (folder / COUNTER).stat().st_size:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.3))
            finally:
                process.kill()
            messages = process.stderr.read().decode() if process.stderr else ""
        if process.returncode != -9:
            found.failures += (f"kill {kill}: the process ended by itself: {messages[-500:]}",)
            continue
        found.kills += 1
        saved = int((folder / COUNTER).read_text().split()[-1])
        found.saves += saved
        expected_files = {ADAPTER, CHECKPOINT, COUNTER}
        found.partial += any(path.name not in expected_files for path in folder.iterdir())
        try:
            numbers = loaded(folder)
        except Exception as error:  # whatever it is, it is what the trial looks for
            found.failures += (f"kill {kill}: {error!r}",)
            continue
        if not all(saved <= number <= saved + 1 for number in numbers):
            found.failures += (f"kill {kill}: {saved} saves ended, the files hold {numbers}",)
        save(tcur.load_adapter(network(), folder / ADAPTER), 0, folder)
        left = {path.name for path in folder.iterdir()} - expected_files
        if left or loaded(folder) != (0, 0):
            found.failures += (
                f"kill {kill}: after the next save there are {sorted(left)}, the files hold {loaded(folder)}",
            )
    return found


def results(run: Path) -> dict[str, object]:
    """Every file of a run that the same settings make again; tables without their times."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".csv":
            found[name] = [
                {key: value for key, value in row.items() if key not in ("seconds", "step_ms")}
                for row in read_csv(path)
            ]
        elif path.suffix == ".safetensors" or path.name.endswith((".nii.gz", "before.json", "transformer.json")):
            found[name] = path.read_bytes()
        else:
            found[name] = "is there"
    return found


def finetune(run: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tcurlora_ext", "finetune", "--output", str(run), *TINY, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_finetuning(kills: int, draw: random.Random, folder: Path) -> tuple[list[str], list[str]]:
    """Kill a run `kills` times, resume it, and compare it with a whole one.

    Returns:
        What the run had reached at each kill, and the failures.
    """
    with finetune(folder / "whole") as process:
        process.communicate()
    reached: list[str] = []
    run = folder / "killed"
    while len(reached) < kills:
        with finetune(run, "--resume") as process:
            # the kills reach one phase of the run after the other, each at a random moment soon after its begin
            aim = list(MARKS.values())[len(reached) * len(MARKS) // kills]
            while process.poll() is None and not has_reached(run, aim):
                time.sleep(0.01)
            try:
                process.wait(draw.uniform(0, 1))
            except subprocess.TimeoutExpired:
                process.kill()
            errors = process.communicate()[1].decode()
        if process.returncode != -9:
            if process.returncode:
                return reached, [f"the run ended by itself: {errors[-500:]}"]
            break  # it was finished before the kill
        reached.append(phase(run))
    with finetune(run, "--resume") as process:
        errors = process.communicate()[1].decode()
    if process.returncode:
        return reached, [f"the resumed run failed: {errors[-500:]}"]
    whole, resumed = results(folder / "whole"), results(run)
    differ = [name for name in sorted(whole | resumed) if whole.get(name) != resumed.get(name)]
    return reached, [f"{name} differs from that of the whole run" for name in differ]


MARKS = {
    "data": "making data", "pretrain/checkpoint.pt": "in pretraining", "base.safetensors": "pretrained",
    "tcur/seed0/checkpoint.pt": "in training", "tcur/seed0/result.json": "scored",
}  # fmt: skip
"""The phases of a run in their order, each by the first file that it writes."""


def phase(run: Path) -> str:
    """How far a run has come, by the files that it has written."""
    return next((text for name, text in reversed(MARKS.items()) if (run / name).exists()), "starting")


def has_reached(run: Path, aim: str) -> bool:
    """Whether a run has come to a phase or to one after it."""
    order = ["starting", *MARKS.values()]
    return order.index(phase(run)) >= order.index(aim)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saving", type=int, nargs="?", default=50, help="kills of a process that saves; 0: none")
    parser.add_argument("finetuning", type=int, nargs="?", default=6, help="kills of a fine-tuning run; 0: none")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--save-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.save_to is not None:
        save_for_ever(options.save_to)
    draw = random.Random(options.seed)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.saving:
            (folder / "saved").mkdir()
            found = kill_savers(options.saving, draw, folder / "saved")
            figures = f"{found.kills} kills in {found.saves} saves, {found.partial} left a partial file"
            failures += report(figures, found.failures)
        if options.finetuning:
            reached, differences = kill_finetuning(options.finetuning, draw, folder)
            figures = f"{len(reached)} kills of a fine-tuning run ({', '.join(reached)})"
            failures += report(figures, differences)
    return int(bool(failures))


def report(figures: str, failures: Sequence[str]) -> Sequence[str]:
    """Print the failures and the line of figures."""
    print(*failures, f"{figures}: {len(failures)} failures", sep="\n", flush=True)
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
