"""Adapted networks to predict with: chosen from a run folder of `finetune`, or from an adapter file and its base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.adapter.subspace.files import OF_ADAPTER
from tcurlora_ext.io.records import read_json
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.segmentation.methods import METHOD_KEY, METHODS, folder_name, get_methods
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean
from tcurlora_ext.segmentation.networks import (
    NetworkConfig,
    build_network,
    get_spec,
    has_prefix,
    load_weights,
    read_weights,
)
from tcurlora_ext.segmentation.runs.folder import RESULT
from tcurlora_ext.segmentation.runs.network import load_adapted

PREFERRED = "tcur"


@dataclass(frozen=True)
class Predictor:
    """Adapted networks whose mean is the prediction, and what they were trained for.

    Attributes:
        models: One for each seed.
        config: Of the network; it says the window, the voxel size and the channels.
        labels: Class names by the value in labels, in the order of the network's outputs.
        title: What was chosen, and why where nobody has said what to choose.
        origin: What says whether two predictions were made alike: a JSON object.
    """

    models: tuple[nn.Module, ...]
    config: NetworkConfig
    labels: dict[int, str]
    title: str
    origin: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder of `finetune` with at least one finished method.

    Attributes:
        folder: The run folder.
        description: The content of run.json.
        labels: Class names by the value in labels, in the order of the network's outputs.
        seeds: The finished seeds of each method; methods in the order of `METHODS`.
    """

    folder: Path
    description: dict[str, Any]
    labels: dict[int, str]
    seeds: dict[str, tuple[int, ...]]


def open_run(folder: Path) -> Run:
    """Look at a run folder without loading a network.

    Raises:
        FileNotFoundError: There is no such folder, or a file of a run is missing in it.
        ValueError: It is a file, a run of another command, or no method has finished.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected a run folder of `tcurlora finetune`")
    if not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a run folder of `tcurlora finetune`")
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder}: found no run.json, expected a run folder of `tcurlora finetune`")
    description = read_json(folder / "run.json")
    command = description.get("command") if isinstance(description, dict) else None
    if command != "finetune":
        raise ValueError(f"{folder}: found a run of '{command}', expected one of 'finetune', which makes adapters")
    settings = description.get("settings", {})
    given = {"factors": settings.get("factors") or "given"}
    with_options = get_methods(settings["methods"], given) if settings.get("methods") else []
    folders = {method.name: method.folder for method in (*METHODS.values(), *with_options)}
    seeds = {name: _finished(folder / own) for name, own in folders.items()}
    finished = {name: numbers for name, numbers in seeds.items() if numbers}
    if not finished:
        raise ValueError(
            f"{folder}: found no finished method (METHOD/seedK/result.json), expected at least one; "
            "`tcurlora finetune --resume` with the options of this run finishes it"
        )
    for name in ("network.json", "base.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected it in a run folder")
    return Run(folder, description, _labels(folder / "run.json", description), finished)


def _finished(folder: Path) -> tuple[int, ...]:
    """The seeds of a method that have a result.json, which is written last."""
    names = [path.parent.name.removeprefix("seed") for path in folder.glob("seed*/result.json")]
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def _labels(path: Path, description: dict[str, Any]) -> dict[int, str]:
    try:
        pairs = {int(value): str(name) for value, name in description["data"]["labels"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: found no names of classes, expected data.labels by value") from None
    return dict(sorted(pairs.items()))


def choose_method(run: Run, method: str | None) -> tuple[str, str]:
    """The method to take, and why: the one asked for, else tcur, else the one with the best Dice.

    Raises:
        ValueError: The method is unknown, or no seed of it has finished.
    """
    if method is not None:
        if method in run.seeds:
            return method, "as asked for"
        (chosen,) = get_methods([method], {"factors": "given"})
        if chosen.name not in run.seeds:
            begun = (run.folder / chosen.folder).is_dir()
            what = "is not finished" if begun else "was not part of it"
            raise ValueError(f"{run.folder}: the method '{method}' {what}, expected one of {', '.join(run.seeds)}")
        return chosen.name, "as asked for"
    if len(run.seeds) == 1:
        return next(iter(run.seeds)), "the only finished method"
    if PREFERRED in run.seeds:
        return PREFERRED, f"by default; the run also has {', '.join(name for name in run.seeds if name != PREFERRED)}"
    dice = {name: finite_mean([_dice(run, name, seed) for seed in seeds]) for name, seeds in run.seeds.items()}
    best = max(dice, key=lambda name: (dice[name] == dice[name], dice[name]))  # NaN last
    return best, f"the best on validation, Dice {100 * dice[best]:.1f}, of {', '.join(run.seeds)}"


def _dice(run: Run, method: str, seed: int) -> float:
    return float(read_json(run.folder / folder_name(method) / f"seed{seed}" / RESULT)["dice"])


def choose_seeds(run: Run, method: str, seeds: str | Sequence[int] | None) -> tuple[int, ...]:
    """The seeds to take: those asked for, "all" finished ones, or with None the first.

    Raises:
        ValueError: A seed is given twice, or has not finished.
    """
    finished = run.seeds[method]
    if seeds is None:
        return finished[:1]
    wanted = finished if seeds == "all" else _numbers(seeds)
    missing = [seed for seed in wanted if seed not in finished]
    if missing or not wanted:
        raise ValueError(
            f"{run.folder}: seed {', '.join(map(str, missing)) or '(none)'} of '{method}' is not a finished one, "
            f"expected some of {', '.join(map(str, finished))}, or all"
        )
    return wanted


def _numbers(seeds: str | Sequence[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in (seeds.split(",") if isinstance(seeds, str) else seeds))
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"seed: found '{seeds}', expected whole numbers with commas between, each once, or all")
    return numbers


def load_predictor(
    run_dir: Path, method: str | None = None, seeds: str | Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Predictor:  # fmt: skip
    """The adapted networks of a run.

    Args:
        run_dir: The run folder.
        method: None for tcur where it has finished, else the only or best method.
        seeds: Numbers, "all", or None for the first. The mean over several is the prediction.
        device: Where the networks compute.

    Raises:
        ValueError, FileNotFoundError: Of :func:`open_run`, :func:`choose_method` and :func:`choose_seeds`.
    """
    run = open_run(run_dir)
    name, why = choose_method(run, method)
    chosen = choose_seeds(run, name, seeds)
    config = NetworkConfig.read(run.folder / "network.json")
    files = [run.folder / folder_name(name) / f"seed{seed}" / "adapter.safetensors" for seed in chosen]
    models = tuple(load_adapted(run.folder, name, seed).to(device) for seed in chosen)
    several = f"seeds {', '.join(map(str, chosen))}, mean of their probabilities" if len(chosen) > 1 else ""
    title = f"{run.folder}: method {name} ({why}), {several or f'seed {chosen[0]}'}"
    return Predictor(models, config, run.labels, title, _origin([run.folder / "base.safetensors", *files], run.labels))


def _origin(files: Sequence[Path], labels: dict[int, str]) -> dict[str, Any]:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return {
        "base_sha256": digests[0], "adapters_sha256": digests[1:],
        "labels": {str(value): name for value, name in labels.items()},
    }  # fmt: skip


def load_files(adapter: Path, base: Path, device: torch.device | str = "cpu") -> Predictor:
    """The network of an adapter file, on base weights with network.json beside one of the two.

    The number of classes is that of the adapter's head, where it has one: it may be another than that of the base.
    Names of classes are read from run.json beside network.json, and are "label 1", ... without it.

    Args:
        adapter: Adapter file of any method.
        base: The weights that it was trained on.
        device: Where the network computes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files are damaged or do not fit each other.
    """
    adapter, base = Path(adapter), Path(base)
    for path, what in ((adapter, "an adapter file"), (base, "base weights")):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected {what}")
    found = next((p.parent for p in (base, adapter) if (p.parent / "network.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{base.parent / 'network.json'}: no such file; expected it beside {base}")
    config = NetworkConfig.read(found / "network.json")
    spec = get_spec(config.network)
    header, tensors = read_tensors(adapter, "an adapter file")
    if not header:
        raise ValueError(f"{adapter}: found weights without an adapter's header, expected an adapter file")
    name = header.get(METHOD_KEY) or (
        PREFERRED if OF_ADAPTER in header else _method_of(list(tensors), spec.head, spec.decoder)
    )
    if name not in METHODS:
        raise ValueError(f"{adapter}: found a file of the method '{name}', expected one of {', '.join(METHODS)}")
    heads = [t for key, t in tensors.items() if has_prefix(key.removeprefix("trained."), spec.head)]
    config = replace(config, out_channels=int(heads[0].shape[0]) if heads else config.out_channels)
    model = build_network(config)
    new_head = load_weights(model, read_weights(base), spec, base)
    if new_head and not heads:
        raise ValueError(f"{adapter}: holds no head, and that of {base} is for another number of classes")
    METHODS[name].load(model, adapter, spec, METHODS[name].prepare)
    run = found / "run.json"
    labels = _labels(run, read_json(run)) if run.is_file() else {}
    if len(labels) != config.out_channels:
        labels = {value: f"label {value}" if value else "background" for value in range(config.out_channels)}
    title = f"{adapter} ({name}) on {base}"
    return Predictor((model.eval().to(device),), config, labels, title, _origin([base, adapter], labels))


def _method_of(names: Sequence[str], head: tuple[str, ...], decoder: tuple[str, ...]) -> str:
    """The method that has trained the parameters of these names."""
    if any(".lora_" in name for name in names):
        return "lora"
    parts = (("head", head), ("decoder", decoder))
    return next((method for method, prefixes in parts if all(has_prefix(name, prefixes) for name in names)), "full")
