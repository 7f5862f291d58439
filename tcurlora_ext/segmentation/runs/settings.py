"""The settings of a fine-tuning run, and settings read back from the run.json of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.dataset.cases import VAL_FRACTION
from tcurlora_ext.segmentation.dataset import DataOptions
from tcurlora_ext.segmentation.methods import METHODS, STANDARD, Method, MethodOptions, learning_rate
from tcurlora_ext.segmentation.runs.pretraining import EMBEDDED_SUBJECTS
from tcurlora_ext.segmentation.training import TrainingOptions

Settings = TypeVar("Settings", bound=Any)


@dataclass(frozen=True)
class FinetuneSettings(TrainingOptions, DataOptions):
    """Options of `tcurlora finetune`, where they are described by --help; None means the default of network or method.

    Attributes:
        data: None for the embedded target domain.
        pretrained: None to pretrain on the embedded source domain, which needs `data` to be None too.
        seeds: How many; the seeds are 0 to seeds - 1.
        lr: Peak learning rates by method.
        factors: The file of a subspace, for methods that take one.
        subjects: How many embedded target subjects are made for training and for validation.
        source_subjects: The same for the source domain.
        tune: Whether each method's learning rate is searched first, on folds of the training cases.
        trials: Candidates of each method in that search.
        tune_over: What is searched beside the learning rate: "rank", "alpha", both or nothing.
        tune_folds: In how many parts the training cases are divided for it.
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
    pretrain_steps: int = 450
    subjects: tuple[int, int] = EMBEDDED_SUBJECTS["target"]
    source_subjects: tuple[int, int] = EMBEDDED_SUBJECTS["source"]
    checkpoint_every: int = 25
    device: str = "auto"
    tune: bool = False
    trials: int = 3
    tune_over: tuple[str, ...] = ()
    tune_folds: int = 3

    def options(self, spec_default: str, seed: int, method: Method | None = None) -> MethodOptions:
        """The options that a method takes."""
        own = {} if method is None else method.own
        return MethodOptions(self.also_train or spec_default, self.rank, self.alpha, self.lora_rank, seed, own)


def beside_rate(settings: FinetuneSettings, spec_default: str) -> float:
    """The learning rate of what trains beside an adapter: that which it has alone."""
    return learning_rate(METHODS[settings.also_train or spec_default], settings.lr)


def read_settings(folder: Path, command: str, kind: type[Settings]) -> Settings:
    """The settings of the run in a folder; what its run.json has no entry for has the default.

    Args:
        folder: The run folder.
        command: That the run has to be of.
        kind: The class of its settings.

    Raises:
        FileNotFoundError, ValueError: The folder has no run.json, or one of another command or of a later version.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a run to resume")
    run = read_json(path)
    if not isinstance(run, dict) or run.get("command") != command or not isinstance(run.get("settings"), dict):
        found = run.get("command") if isinstance(run, dict) else None
        raise ValueError(f"{path}: found a run of '{found}', expected one of {command}")
    types = {field.name: str(field.type) for field in fields(kind)}
    unknown = sorted(set(run["settings"]) - set(types))
    if unknown:
        raise ValueError(f"{path}: found the settings {', '.join(unknown)}, expected those of this version")
    settings = kind(**{name: _typed(value, types[name]) for name, value in run["settings"].items()})
    if settings.val_fraction == VAL_FRACTION:  # recorded in place of None, which is allowed beside splits.json
        settings = replace(settings, val_fraction=None)
    return settings


def _typed(value: Any, annotation: str) -> Any:
    """A value of run.json as the type of its field."""
    if value is None:
        return None
    if annotation.startswith("Path"):
        return Path(value)
    if annotation.startswith("dict[int"):  # JSON has names alone as keys
        return {int(key): part for key, part in value.items()}
    return tuple(value) if annotation.startswith("tuple") else value
