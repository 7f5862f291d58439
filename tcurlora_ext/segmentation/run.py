"""Adapting a pretrained network to a data set by several methods, side by side, in one run folder.

    run.json                          settings, versions, cases
    network.json  base.safetensors    the pretrained network
    transformer.json                  its Dice with trained and with random transformer blocks
    before.json                       its scores before adaptation, where its head has the right classes
    data/  pretrain/                  only without --data: the embedded subjects, and how the network was pretrained
    <method>/seed<k>/                 adapter.safetensors, metrics.csv, cases.csv, result.json; while it trains,
                                      checkpoint.pt
    metrics.csv  summary.csv          scores, one row per method and seed, and one row per method
    curves.png  overlays.png  report.html

`result.json` is written last: a method and seed that has one is finished, and `resume` does not run it again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.records import read_json, write_csv, write_json
from tcurlora_ext.segmentation import evaluation, report, training
from tcurlora_ext.segmentation.checkpoints import Base, Wanted, base_warnings, open_base
from tcurlora_ext.segmentation.dataset import SegmentationDataset, Volume, load_volumes, read_dataset
from tcurlora_ext.segmentation.methods import (
    METHODS,
    STANDARD,
    Method,
    MethodOptions,
    Task,
    base_name,
    beside,
    folder_name,
    get_methods,
    learning_rate,
)
from tcurlora_ext.segmentation.networks import (
    NetworkConfig,
    build_network,
    check_network,
    get_spec,
    load_weights,
    randomise,
    read_weights,
    save_weights,
)
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.pretraining import (
    EMBEDDED_SUBJECTS,
    PretrainSettings,
    check_positive,
    describe_check,
    describe_data,
    embedded,
    pick_device,
    pretrain,
    with_fraction,
)
from tcurlora_ext.segmentation.runfolder import check_folder, describe, open_folder, record
from tcurlora_ext.segmentation.terminal import Display


@dataclass(frozen=True)
class FinetuneSettings:
    """Options of `tcurlora finetune`, where they are described by --help; None means the default of network or method.

    Attributes:
        data: None for the embedded target domain.
        pretrained: None to pretrain on the embedded source domain, which needs `data` to be None too.
        seeds: How many; the seeds are 0 to seeds - 1.
        lr: Peak learning rates by method.
        factors: The file of a subspace, for methods that take one.
        subjects: How many embedded target subjects are made for training and for validation.
        source_subjects: The same for the source domain.
    """

    data: Path | None = None
    pretrained: Path | None = None
    methods: tuple[str, ...] = STANDARD
    seeds: int = 1
    also_train: str | None = None
    rank: int = 8
    alpha: float = 4.0
    lora_rank: int = 8
    steps: int = 120
    batch: int = 2
    lr: dict[str, float] = field(default_factory=dict)
    factors: Path | None = None
    network: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    roi: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    train_list: str = "train"
    val_list: str = "val"
    val_fraction: float | None = None
    labels: tuple[str, ...] | None = None
    fold: int | None = None
    map_labels: dict[int, int] | None = None
    pretrain_steps: int = 450
    data_seed: int = 0
    subjects: tuple[int, int] = EMBEDDED_SUBJECTS["target"]
    source_subjects: tuple[int, int] = EMBEDDED_SUBJECTS["source"]
    checkpoint_every: int = 25
    device: str = "auto"

    def options(self, spec_default: str, seed: int, method: Method | None = None) -> MethodOptions:
        """The options that a method takes."""
        own = {} if method is None else method.own
        return MethodOptions(self.also_train or spec_default, self.rank, self.alpha, self.lora_rank, seed, own)


@dataclass(frozen=True)
class _Job:
    """What all methods and seeds of a run share."""

    out: Path
    settings: FinetuneSettings
    config: NetworkConfig
    head_is_new: bool
    classes: tuple[str, ...]
    train: list[Volume]
    val: list[Volume]
    device: torch.device
    display: Display


def finetune(
    settings: FinetuneSettings, out: Path, *, resume: bool = False, display: Display | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Adapt a network by every method and seed, and write the adapters, tables and report to the folder `out`.

    Returns:
        The rows of summary.csv.

    Raises:
        ValueError, FileNotFoundError: Settings, data or weights are wrong; raised before the folder is made or changed.
    """
    display = display or Display()
    for package in ("matplotlib", "jinja2"):  # the report comes last, after all the training
        require_package(package)
    methods = _check(settings)
    rated = [*(METHODS[name] for name in STANDARD), *methods]
    settings = replace(settings, lr={method.name: learning_rate(method, settings.lr) for method in rated})
    description = describe("finetune", with_fraction(settings))
    check_folder(out, description, resume)
    data = None if settings.data is None else read_data(settings, settings.data)
    if settings.pretrained is not None and data is not None:
        # Raises where they do not fit, before anything is written; so does a subspace of another network.
        base = open_pretrained(settings, settings.pretrained, data)
        for method in (method for method in methods if "factors" in method.own):
            spec = get_spec(base.config.network)
            method.prepare(copy.deepcopy(base.model), spec, settings.options(spec.also_train, 0, method), None)
    open_folder(out, description, resume)
    if data is None:
        folder = embedded(out / "data", "target", settings.subjects, settings.data_seed, display)
        data = read_data(settings, folder)
    record(out, "data", describe_data(data))
    pretrained = settings.pretrained or _pretrain_embedded(settings, out, display)
    base = open_pretrained(settings, pretrained, data)
    _take_base(base, out)
    for line in base.said:
        display.say(f"weights: {line}")
    config, head_is_new = base.config, base.head_is_new
    if base.random:
        settings = replace(settings, also_train="decoder")
    job = _Job(
        out, settings, config, head_is_new, data.classes, load_volumes(data.train, config.spacing),
        load_volumes(data.val, config.spacing), pick_device(settings.device), display,
    )  # fmt: skip
    if not head_is_new and not (out / "before.json").is_file():
        scores = evaluation.evaluate(load_base(out).to(job.device), job.val, config)
        write_json(out / "before.json", evaluation.summarise(scores, job.classes))
    for line in base_warnings(out):
        display.say(line)
    results = []
    for seed in range(settings.seeds):
        for method in methods:
            results.append(_adapt(job, method, seed))
            write_csv(out / "metrics.csv", results)
    summary = report.summarise_runs(results)
    write_csv(out / "summary.csv", summary)
    predictions = _predictions(job, methods)
    report.write_report(out, job.val, predictions)
    display.console.print(report.table(summary))
    for line in report.comparisons(summary):
        display.say(line)
    display.say(report.before_text(out))
    if (out / "transformer.json").is_file():
        display.say(describe_check(read_json(out / "transformer.json")))
    display.say(f"report: {out / 'report.html'}")
    return summary


def load_base(run_dir: Path) -> nn.Module:
    """The pretrained network of a run of `finetune` or `pretrain`, not adapted, in eval mode and on the CPU."""
    config = NetworkConfig.read(run_dir / "network.json")
    model = build_network(config)
    path = run_dir / "base.safetensors"
    load_weights(model, read_weights(path), get_spec(config.network), path)
    return model.eval()


def load_adapted(run_dir: Path, method: str, seed: int = 0) -> nn.Module:
    """The network of a run with the adapter of a method and seed, in eval mode and on the CPU.

    Raises:
        FileNotFoundError: The run has no adapter of this method and seed.
    """
    config = NetworkConfig.read(run_dir / "network.json")
    chosen = METHODS.get(base_name(method)) or get_methods([method])[0]  # which raises for an unknown name
    model = load_base(run_dir)
    path = run_dir / folder_name(method) / f"seed{seed}" / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the adapter of a finished run of '{method}'")
    chosen.load(model, path, get_spec(config.network), chosen.prepare)
    return model.eval()


def _check(settings: FinetuneSettings) -> list[Method]:
    check_positive(
        steps=settings.steps, batch=settings.batch, seeds=settings.seeds, rank=settings.rank, alpha=settings.alpha,
        lora_rank=settings.lora_rank, checkpoint_every=settings.checkpoint_every, **settings.lr,
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
    pick_device(settings.device)
    if settings.pretrained is None:
        check_network(_embedded_config(settings))
    return methods


def _embedded_config(settings: FinetuneSettings) -> NetworkConfig:
    return NetworkConfig(
        settings.network or "vit", 1, 3, settings.roi or (32, 32, 32), settings.spacing, settings.sizes
    )  # fmt: skip


def read_data(settings: FinetuneSettings, folder: Path) -> SegmentationDataset:
    """The data set in a folder, by the options of the settings."""
    return read_dataset(
        folder, train_list=settings.train_list, val_list=settings.val_list, val_fraction=settings.val_fraction,
        seed=settings.data_seed, labels=settings.labels, fold=settings.fold, map_labels=settings.map_labels,
    )  # fmt: skip


def _pretrain_embedded(settings: FinetuneSettings, out: Path, display: Display) -> Path:
    """Weights pretrained on the embedded source domain inside the run folder."""
    config, folder = _embedded_config(settings), out / "pretrain"
    if not (folder / "transformer.json").is_file():
        pretrain(
            PretrainSettings(
                network=config.network, sizes=config.sizes, roi=config.roi, spacing=config.spacing,
                steps=settings.pretrain_steps, data_seed=settings.data_seed, subjects=settings.source_subjects,
                checkpoint_every=settings.checkpoint_every, device=settings.device,
            ),
            folder, resume=True, display=display,
        )  # fmt: skip
    return folder / "base.safetensors"


def open_pretrained(settings: FinetuneSettings, path: Path, data: SegmentationDataset) -> Base:
    """The network with these weights, for the channels and classes of the data.

    Raises:
        ValueError, FileNotFoundError: Of :func:`~tcurlora_ext.segmentation.checkpoints.open_base`; or the head alone is
            to train beside adapters where the decoder starts at random.
    """
    base = open_base(
        path,
        Wanted(data.channels, len(data.labels), settings.network, settings.sizes, settings.roi, settings.spacing),
    )
    if base.random and settings.also_train == "head":
        raise ValueError(f"also-train: found 'head', expected 'decoder': it starts at random, {base.file} has none")
    return base


def load_pretrained(
    settings: FinetuneSettings, path: Path, data: SegmentationDataset
) -> tuple[NetworkConfig, nn.Module, bool]:
    """The network's configuration, the model with these weights, and whether its head is new."""
    base = open_pretrained(settings, path, data)
    return base.config, base.model, base.head_is_new


def _take_base(base: Base, out: Path) -> None:
    """Copy the pretrained network, and the transformer.json beside it, into the run folder."""
    digest = hashlib.sha256(base.file.read_bytes()).hexdigest()
    record(out, "base", {"sha256": digest, "head_is_new": base.head_is_new})
    if base.said:
        record(out, "weights", {"said": list(base.said), "random": list(base.random)})
    base.config.save(out / "network.json")
    save_weights(base.model, out / "base.safetensors")
    check = base.file.parent / "transformer.json"
    if check.is_file():
        write_json(out / "transformer.json", read_json(check))


def _adapt(job: _Job, method: Method, seed: int) -> dict[str, Any]:
    """Train by one method and seed, save the adapter, read it back and score it; returns the row of metrics.csv."""
    folder = job.out / method.folder / f"seed{seed}"
    if (folder / "result.json").is_file():
        result: dict[str, Any] = read_json(folder / "result.json")
        return result
    spec, settings = get_spec(job.config.network), job.settings
    options = settings.options(spec.also_train, seed, method)
    model = load_base(job.out)
    if job.head_is_new:  # a head for other classes starts from random weights of its own for each seed
        randomise(model, job.config, spec.head, seed)
    plan = _plan(job, method, options)
    method.prepare(model, spec, options, Task(job.train, plan, job.device, folder))
    model.to(job.device)
    trained = sum(parameter.numel() for parameter in training.trainable(model).values())
    with job.display.bar(f"{method.name}, seed {seed}", plan.steps) as on_step:
        progress = training.train(
            model, job.train, plan, folder, on_step=on_step,
            validate=lambda current: evaluation.mean_dice(current, job.val[:4], job.config),
        )  # fmt: skip
    method.save(model, folder / "adapter.safetensors", options)
    scores = evaluation.evaluate(load_adapted(job.out, method.name, seed).to(job.device), job.val, job.config)
    write_csv(folder / "cases.csv", [
        {"case": case.name}
        | {f"dice {name}": value for name, value in zip(job.classes, case.dice, strict=True)}
        | {f"hd95_mm {name}": value for name, value in zip(job.classes, case.hd95, strict=True)}
        for case in scores
    ])  # fmt: skip
    row = {
        "method": method.name, "seed": seed, "trained_numbers": trained, "lr": plan.lr, "steps": plan.steps,
        **evaluation.summarise(scores, job.classes), "seconds": round(progress.seconds, 2),
        "warm_up_steps": method.warm_up(options), "adapter_bytes": (folder / "adapter.safetensors").stat().st_size,
    }  # fmt: skip
    write_json(folder / "result.json", row)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    job.display.say(
        f"{method.name}, seed {seed}: {trained:,} trained parameters, Dice {100 * row['dice']:.1f}, "
        f"HD95 {row['hd95_mm']:.2f} mm"
    )
    return row


def _plan(job: _Job, method: Method, options: MethodOptions) -> training.Plan:
    """How a method trains: its learning rates, and the same steps and windows for all methods of a seed."""
    settings, spec = job.settings, get_spec(job.config.network)
    plan = training.Plan(
        settings.steps,
        settings.batch,
        settings.lr[method.name],
        options.seed,
        job.config.roi,
        checkpoint_every=settings.checkpoint_every,
        eval_every=max(1, settings.steps // 3),
    )
    if not method.adapter:
        return plan
    return replace(plan, beside=beside(spec, options), beside_lr=beside_rate(settings, spec.also_train))


def beside_rate(settings: FinetuneSettings, spec_default: str) -> float:
    """The learning rate of what trains beside an adapter: that which it has alone."""
    return learning_rate(METHODS[settings.also_train or spec_default], settings.lr)


def _predictions(job: _Job, methods: Sequence[Method], cases: int = 3) -> dict[str, list[torch.Tensor]]:
    """Label values predicted for the first validation cases, by the base (unless its head is new) and every method."""
    models = {} if job.head_is_new else {"before": load_base(job.out)}
    models |= {method.name: load_adapted(job.out, method.name) for method in methods}
    return {
        name: [evaluation.predict(model.to(job.device), volume, job.config.roi) for volume in job.val[:cases]]
        for name, model in models.items()
    }
