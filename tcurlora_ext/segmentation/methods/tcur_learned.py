"""tCUR over factors learned on the same training cases: a warm-up of the whole weights, then cores from zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.learning import warmup
from tcurlora_ext.maths.coding import CODED_BITS
from tcurlora_ext.segmentation.networks import NetworkSpec
from tcurlora_ext.segmentation.training import loss_step

from .base import Method, MethodOptions, Task, Unset
from .tcur import SUBSPACE, inject, load, prefixes_beside, save


def learned_config(options: MethodOptions, method: Method) -> tcur.TCURConfig:
    """The configuration of an adapter over learned factors, with a method's own options."""
    return tcur.TCURConfig.preset(
        "learned", rank=method.option(options, "rank", options.rank), alpha=method.option(options, "alpha"),
        factors="learned_rows" if method.option(options, "rows_only") else "learned", seed=options.seed,
    )  # fmt: skip


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    if task is None:
        raise ValueError("tcur-learned learns its factors on the training cases, which are not given")
    config, path = learned_config(options, METHOD), task.folder / SUBSPACE
    model.to(task.device)
    if path.is_file():  # a resumed run has learned it before
        subspace = tcur.Subspace.load(path)
    elif change := METHOD.option(options, "change"):
        subspace = tcur.factors_of_change(
            model, config, change.format(seed=options.seed), METHOD.option(options, "bits")
        )
    else:
        task.say(f"a warm-up of {_warm_up(options):,} steps, which learns the factors")
        subspace = tcur.learn_factors(
            model, config, loss_step(task.volumes, task.plan), METHOD.option(options, "warm_up"),
            unfreeze=prefixes_beside(spec, options), unfreeze_lr=task.plan.beside_lr or None,
            bits=METHOD.option(options, "bits"),
        )  # fmt: skip
    if not path.is_file():
        subspace.save(path)
    inject(model, config, spec, options, subspace=subspace)


def _check(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    warmup.WarmUp(METHOD.option(options, "warm_up"), bits=METHOD.option(options, "bits"))  # which checks them
    change = METHOD.option(options, "change").format(seed=options.seed)
    if change and not Path(change).exists():
        raise FileNotFoundError(f"{change}: no such file or folder; expected the change that tcur-learned takes")
    # Factors of the weights stand for the learned ones, of which they have the shapes.
    inject(model, replace(learned_config(options, METHOD), factors="weights"), spec, options)


def _warm_up(options: MethodOptions) -> int:
    return 0 if METHOD.option(options, "change") else int(METHOD.option(options, "warm_up"))


METHOD = Method(
    "tcur-learned", "tCUR over learned factors", _prepare, 1e-2, save, load, "#a50f15", adapter=True,
    options={"rank": Unset(int), "alpha": 1.0, "bits": CODED_BITS, "warm_up": warmup.STEPS, "rows_only": False,
             "change": ""}, warm_up=_warm_up, check=_check, standard=True, merge=tcur.merge,
)  # fmt: skip
