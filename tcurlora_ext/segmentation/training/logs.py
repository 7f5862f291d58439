"""Curves of a training in TensorBoard and MLflow, beside metrics.csv."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tcurlora_ext.io.records import read_json, write_json

LOGS = ("tensorboard", "mlflow")
Log = Callable[[int, dict[str, float]], None]


def check_logs(names: Sequence[str]) -> None:
    """Raise ValueError where a name is unknown or its package is not installed."""
    for name in names:
        if name not in LOGS:
            raise ValueError(f"log: found '{name}', expected some of {', '.join(LOGS)} with commas between")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log: the package '{name}' is not installed; expected it for {name}: pip install {name}")


@contextmanager
def open_logs(names: Sequence[str], run: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Yield a function that takes the number of steps done and what was measured after the last of them.

    TensorBoard's files lie in the folder `tensorboard` of the run. MLflow writes where MLFLOW_TRACKING_URI says, or
    else to the folder `mlruns` of the run. A resumed training goes on in the same curves:
    steps that it takes again have the same values.

    Args:
        names: Some of `LOGS`.
        run: The run folder.
        title: Of this training, with slashes, such as "tcur/seed0".
        settings: What the training is made with, for MLflow's parameters.
    """
    makers = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    with ExitStack() as opened:
        logs = [opened.enter_context(makers[name](run, title, settings)) for name in names]

        def log(done: int, measured: dict[str, float]) -> None:
            for one in logs:
                one(done, measured)

        yield log


@contextmanager
def _tensorboard(run: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run / "tensorboard" / title))

    def log(done: int, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            writer.add_scalar(name, value, done)
        writer.flush()  # what a kill loses is one step

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _mlflow(run: Path, title: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    mlflow: Any = importlib.import_module("mlflow")  # which has no types where it is not installed
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (run / "mlruns").absolute().as_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    record = run / title / "mlflow.json"  # by which a resumed training finds its run
    if record.is_file():
        identity = read_json(record)["run_id"]
    else:
        name = f"tcurlora {run.name}"
        experiment = client.get_experiment_by_name(name)
        key = client.create_experiment(name) if experiment is None else experiment.experiment_id
        identity = client.create_run(key, run_name=title).info.run_id
        for option, value in settings.items():
            client.log_param(identity, option, str(value))
        write_json(record, {"run_id": identity})

    def log(done: int, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            client.log_metric(identity, name, value, step=done)

    yield log
    client.set_terminated(identity)
