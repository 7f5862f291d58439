"""tCUR over a subspace learned on other cases before: the cores are all that is new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.segmentation.networks import NetworkSpec

from .base import Method, MethodOptions, Task, Unset
from .tcur import SUBSPACE, inject, load


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    subspace = tcur.Subspace.load(Path(METHOD.option(options, "factors")))
    rank = METHOD.option(options, "rank", subspace.config.rank)
    config = replace(subspace.config, rank=rank, alpha=METHOD.option(options, "alpha"), seed=options.seed)
    inject(model, config, spec, options, subspace=subspace)
    if task is not None:  # beside the adapter, which names it by its digest
        for known in sorted(task.folder.parent.glob(f"seed*/{SUBSPACE}")):  # of seeds that ran before
            if (digest := tcur.Subspace.load(known).digest) != subspace.digest:
                raise ValueError(
                    f"{METHOD.option(options, 'factors')}: found the subspace {subspace.digest[:12]}, expected "
                    f"{digest[:12]}, over which {known.parent} was trained"
                )
        task.folder.mkdir(parents=True, exist_ok=True)
        subspace.save(task.folder / SUBSPACE)


def _save(model: nn.Module, path: Path, options: MethodOptions) -> None:
    tcur.save_adapter(model, path, include_subspace=False)


METHOD = Method(
    "tcur-carried", "tCUR over a given subspace", _prepare, 1e-2, _save, load, "#6a51a3", adapter=True,
    options={"factors": None, "rank": Unset(int), "alpha": 1.0}, merge=tcur.merge,
)  # fmt: skip
