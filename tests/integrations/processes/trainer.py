"""transformers' Trainer under torchrun: test_processes.py compares the trained parameters with those of one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ..entries import Entry
from ..small_models import EXAMPLES, adapted, base, cores, output, trainer
from .cases import case
from .network import assert_same_everywhere

KIND, STEPS = "Llama", 4


@case
def trainer_saves_what_every_process_has(entry: Entry, folder: Path) -> None:
    model = adapted(KIND, entry)
    run = trainer(
        model,
        KIND,
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=EXAMPLES // distributed.get_world_size(),
        ddp_backend="gloo",
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
    )
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    for name, core in cores(entry, model).items():
        assert_same_everywhere(core, name)
    if distributed.get_rank() == 0:
        entry.save(model, folder)
    distributed.barrier()
    assert torch.equal(output(entry.load(base(KIND), folder), KIND), output(model, KIND))
