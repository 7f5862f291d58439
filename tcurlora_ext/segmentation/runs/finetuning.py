"""Adapting a pretrained network to a data set by several methods, side by side, in one run folder.

    run.json                          settings, versions, cases
    network.json  base.safetensors    the pretrained network
    transformer.json                  its Dice with trained and with random transformer blocks
    before.json                       its scores before adaptation, where its head has the right classes
    data/  pretrain/                  only without --data: the embedded subjects, and how the network was pretrained
    <method>/seed<k>/                 adapter.safetensors, metrics.csv, cases.csv, result.json; while it trains,
                                      checkpoint.pt
    tune.csv                          with --tune: what each candidate reached on folds of the training cases
    metrics.csv  summary.csv          scores, one row per method and seed, and one row per method
    curves.png  overlays.png  report.html

`result.json` is written last: a method and seed that has one is finished, and `resume` does not run it again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.records import read_json, write_csv, write_json
from tcurlora_ext.segmentation.dataset import SegmentationDataset
from tcurlora_ext.segmentation.dataset.subjects import check_pattern, few_subjects
from tcurlora_ext.segmentation.dataset.volumes import open_volumes
from tcurlora_ext.segmentation.methods import METHODS, STANDARD, Method, get_methods, learning_rate
from tcurlora_ext.segmentation.metrics import evaluation
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network, check_network, get_spec
from tcurlora_ext.segmentation.networks.checkpoints import base_warnings
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.report import page as report
from tcurlora_ext.segmentation.runs import tuning
from tcurlora_ext.segmentation.runs.adapting import Choice, Job, adapt
from tcurlora_ext.segmentation.runs.folder import check_folder, describe, open_folder, record
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base, open_pretrained, take_base
from tcurlora_ext.segmentation.runs.pretraining import (
    PretrainSettings,
    check_positive,
    describe_check,
    describe_data,
    embedded,
    pick_device,
    pretrain,
    with_fraction,
)
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.runs.subjects import hold_out, record_held_out
from tcurlora_ext.segmentation.terminal import Display
from tcurlora_ext.segmentation.training import Diverged, check_options, describe_augmentation
from tcurlora_ext.segmentation.training.options import check_class_count

EMBEDDED_CLASSES = 3
PICTURED = 3  # validation cases in overlays


def finetune(
    settings: FinetuneSettings, out: Path, *, resume: bool = False, display: Display | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Adapt a network by every method and seed, and write the adapters, tables and report to the folder `out`.

    Returns:
        The rows of summary.csv.

    Raises:
        ValueError, FileNotFoundError: Settings, data or weights are wrong; raised before the folder is made or changed.
        Diverged: The loss of a method has become infinite or NaN. The others are trained first, and tables and report
            are of them; resumed, the run tries it again, from its first step and at another rate where one is given.
    """
    display = display or Display()
    for package in ("matplotlib", "jinja2"):  # the report comes last, after all the training
        require_package(package)
    methods = check_settings(settings)
    settings = with_rates(settings, methods)
    description = describe("finetune", with_fraction(settings))
    defaults = describe("finetune", FinetuneSettings())["settings"]
    check_folder(out, description, resume, defaults)
    data = None if settings.data is None else settings.read_data(settings.data)
    _check_cases(settings, data)
    base = None
    if settings.pretrained is not None and data is not None:
        # Raises where they do not fit, before anything is written.
        base = open_pretrained(settings, settings.pretrained, data)
        _check_methods(methods, settings, base.config, base.model)
    elif settings.pretrained is None:
        config = _embedded_config(settings)
        _check_methods(methods, settings, config, build_network(config))
    open_folder(out, description, resume, defaults)
    if data is None:
        folder = embedded(out / "data", "target", settings.subjects, settings.data_seed, display)
        data = settings.read_data(folder)
    record(out, "data", describe_data(data))
    display.say(data.division)
    record(out, "augmentation", describe_augmentation(settings.augment, settings.flips))
    record_held_out([case.name for case in data.train], settings, out, display)
    pretrained = settings.pretrained or pretrain_embedded(settings, out / "pretrain", display)
    base = base or open_pretrained(settings, pretrained, data)
    take_base(base, out)
    for line in base.said:
        display.say(f"weights: {line}")
    config = base.config
    job = _make_job(settings, out, data, config, base.head_is_new, bool(base.random), display)
    if not base.head_is_new and not (out / "before.json").is_file():
        scores = evaluation.evaluate(load_base(out).to(job.device), job.val, config)
        write_json(out / "before.json", evaluation.summarise(scores, job.classes))
    for line in base_warnings(out):
        display.say(line)
    choices = tuning.tune(job, methods) if settings.tune else {}
    results: list[dict[str, Any]] = []
    diverged: dict[str, Diverged] = {}
    for seed, method in itertools.product(range(settings.seeds), methods):
        if method.name in diverged:
            continue
        choice = choices.get(method.name, Choice(settings.lr[method.name]))
        try:
            results.append(adapt(job, method, choice, seed))
        except Diverged as error:
            display.say(f"{method.name}, seed {seed}: {error}; the run goes on without this method")
            diverged[method.name] = error
            continue
        write_csv(out / "metrics.csv", results)
    left = [method for method in methods if method.name not in diverged]
    summary = _finish(job, left, [row for row in results if row["method"] not in diverged]) if left else []
    if diverged:
        raise Diverged(f"{', '.join(diverged)}: not in the tables; {next(iter(diverged.values()))}")
    return summary


def open_job(settings: FinetuneSettings, out: Path, display: Display) -> Job:
    """What the methods of a run share, from its folder, where it has begun."""
    run, settings = read_json(out / "run.json"), with_rates(settings, check_settings(settings))
    data = settings.read_data(settings.data or out / "data" / "target")
    config = NetworkConfig.read(out / "network.json")
    random = bool(run.get("weights", {}).get("random"))
    return _make_job(settings, out, data, config, run["base"]["head_is_new"], random, display)


def _make_job(
    settings: FinetuneSettings, out: Path, data: SegmentationDataset, config: NetworkConfig, head_is_new: bool,
    random_decoder: bool, display: Display,
) -> Job:  # fmt: skip
    """What the methods of a run share; a decoder that starts at random trains beside each adapter."""
    if random_decoder:
        settings = replace(settings, also_train="decoder")
    train, val = (open_volumes(cases, config.spacing, settings.cache) for cases in (data.train, data.val))
    return Job(out, settings, config, head_is_new, data.classes, train, val, pick_device(settings.device), display)


def _finish(job: Job, methods: Sequence[Method], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write and show what the methods have reached; returns the rows of summary.csv."""
    out, display = job.out, job.display
    summary = report.summarise_runs(results)
    write_csv(out / "summary.csv", summary)
    report.write_report(out, job.val, first_predictions(job, [method.name for method in methods]))
    display.console.print(report.table(summary))
    for line in report.comparisons(summary):
        display.say(line)
    display.say(report.before_text(out))
    if (out / "transformer.json").is_file():
        network = NetworkConfig.read(out / "network.json").network
        display.say(describe_check(read_json(out / "transformer.json"), network))
    display.say(f"report: {out / 'report.html'}")
    return summary


def with_rates(settings: FinetuneSettings, methods: Sequence[Method]) -> FinetuneSettings:
    """The settings with the learning rate of each method, as run.json records them."""
    rated = [*(METHODS[name] for name in STANDARD), *methods]
    return replace(settings, lr={method.name: learning_rate(method, settings.lr) for method in rated})


def check_settings(settings: FinetuneSettings) -> list[Method]:
    """The methods of a run. ValueError, which names the option, where one of the settings is wrong."""
    check_positive(
        steps=settings.steps, batch=settings.batch, seeds=settings.seeds, rank=settings.rank, alpha=settings.alpha,
        lora_rank=settings.lora_rank, checkpoint_every=settings.checkpoint_every,
        **{f"lr of {name}": rate for name, rate in settings.lr.items()},
    )  # fmt: skip
    methods = get_methods(settings.methods, {"factors": settings.factors})
    if settings.factors is not None and not any("factors" in method.own for method in methods):
        raise ValueError(f"factors: found {settings.factors} and no method that takes them; expected tcur-carried")
    unknown = sorted(set(settings.lr) - set(METHODS) - {method.name for method in methods})
    if unknown:
        raise ValueError(f"lr: found {', '.join(unknown)}, expected methods among {', '.join(METHODS)}")
    if settings.also_train not in (None, "head", "decoder"):
        raise ValueError(f"also-train: found '{settings.also_train}', expected 'head' or 'decoder'")
    if settings.data is not None and settings.pretrained is None:
        raise ValueError(
            "pretrained: found none, expected a file of weights to adapt to --data; "
            "`tcurlora pretrain --data DIR --output BASE` makes one, then give --pretrained BASE/base.safetensors"
        )
    check_pattern(settings.subject_pattern)
    check_options(settings, pick_device(settings.device))
    if settings.tune:
        tuning.check(settings)
    if settings.pretrained is None:
        check_network(_embedded_config(settings))
    return methods


def _check_methods(
    methods: Sequence[Method], settings: FinetuneSettings, config: NetworkConfig, model: nn.Module
) -> None:  # fmt: skip
    """Raise an error where the options of an adapter do not fit the network, or its subspace is of another one.

    Where ranks are searched, one that does not fit is a candidate that is not chosen.
    """
    spec = get_spec(config.network)
    for method in methods:
        searched = settings.tune and "rank" in settings.tune_over and "factors" not in method.own
        if not method.adapter or searched:
            continue
        try:
            method.check_options(copy.deepcopy(model), spec, settings.options(spec.also_train, 0, method))
        except ValueError as error:
            raise ValueError(f"{method.name}: {error}") from None


def _check_cases(settings: FinetuneSettings, data: SegmentationDataset | None) -> None:
    """Raise ValueError where there are too few training cases for the options, or not a weight for each class.

    Args:
        settings: Of the run.
        data: None for the embedded target domain, which is made later.
    """
    names = [str(index) for index in range(settings.subjects[0])] if data is None else [c.name for c in data.train]
    if data is None and settings.shots is not None:
        names = [names[index] for index in few_subjects(names, settings.shots, settings.data_seed, None)]
    check_class_count(settings, EMBEDDED_CLASSES if data is None else len(data.labels))
    if settings.tune:
        tuning.check_cases(settings, names)
    elif settings.holds_out:
        hold_out(names, settings)


def _embedded_config(settings: FinetuneSettings) -> NetworkConfig:
    return NetworkConfig(
        settings.network or "vit", 1, EMBEDDED_CLASSES, settings.roi or (32, 32, 32), settings.spacing, settings.sizes
    )  # fmt: skip


def pretrain_embedded(settings: FinetuneSettings, folder: Path, display: Display) -> Path:
    """Weights pretrained on the embedded source domain in a folder, unless they are there."""
    config = _embedded_config(settings)
    if not (folder / "transformer.json").is_file():
        pretrain(
            PretrainSettings(
                network=config.network, sizes=config.sizes, roi=config.roi, spacing=config.spacing,
                steps=settings.pretrain_steps, data_seed=settings.data_seed, subjects=settings.source_subjects,
                checkpoint_every=settings.checkpoint_every, device=settings.device, cache=settings.cache,
                workers=settings.workers,
            ),
            folder, resume=True, display=display,
        )  # fmt: skip
    return folder / "base.safetensors"


def first_predictions(job: Job, methods: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """Label values predicted for the first validation cases, by the base (unless its head is new) and by methods.

    Args:
        job: A run that has finished the methods.
        methods: Their names.
    """
    models = {} if job.head_is_new else {"before": load_base(job.out)}
    models |= {name: load_adapted(job.out, name) for name in methods}
    return {
        name: [evaluation.predict(model.to(job.device), volume, job.config.roi) for volume in job.val[:PICTURED]]
        for name, model in models.items()
    }
