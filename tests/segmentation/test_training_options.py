"""Precision, accumulation, augmentation, class weights, and weights selected on held-out training cases."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tcurlora_ext.io.records import read_csv, read_json, write_json
from tcurlora_ext.io.tensors import read_checkpoint
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.metrics import evaluation
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.runs.subjects import by_subject, folds, hold_out
from tcurlora_ext.segmentation.training import Interruption, Plan, Sampler, loop, segmentation_loss, train, trainable

ROI = (16, 16, 16)
SMALL = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4}


def small_network() -> nn.Module:
    return build_network(NetworkConfig("vit", 1, 3, ROI, None, SMALL))


@pytest.fixture(scope="module")
def volumes(pristine_data: Path) -> Any:
    return load_volumes(read_dataset(pristine_data).train, None)


class Stopped(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    schedule = loop.schedule

    def raise_at(plan: Plan, now: int) -> float:
        if now == step:
            raise Stopped
        return schedule(plan, now)

    monkeypatch.setattr(loop, "schedule", raise_at)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_float32_parameters_and_resumes_with_the_same_bits(
    amp: str, volumes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(5, 2, 1e-2, 0, ROI, checkpoint_every=2, amp=amp)
    seen: set[torch.dtype] = set()

    def watch(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    whole = small_network()
    whole.get_submodule("out").register_forward_hook(watch)
    expected = train(whole, volumes, plan, tmp_path / "whole")
    assert seen == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert expected.losses != train(small_network(), volumes, Plan(5, 2, 1e-2, 0, ROI), tmp_path / "off").losses
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train(small_network(), volumes, plan, tmp_path / "parts")
    scaler = read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["scaler"]
    assert (scaler is not None) == (amp == "fp16")
    resumed = small_network()
    assert train(resumed, volumes, plan, tmp_path / "parts").losses == expected.losses
    for (name, a), b in zip(trainable(whole).items(), trainable(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_precision_that_the_device_does_not_compute_is_refused_by_name(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise NotImplementedError("\"slow_conv3d\" not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv3d", refuse)
    with pytest.raises(ValueError, match=r"amp: found 'fp16' on cpu, where PyTorch .*slow_conv3d"):
        finetune(settings(amp="fp16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- windows, loss and accumulation -----------------------------------------------------------------------------------


def test_accumulated_batches_are_the_windows_and_the_gradient_of_one_batch(volumes: Any, tmp_path: Path) -> None:
    one, two = Plan(4, 4, 1e-2, 0, ROI), Plan(4, 2, 1e-2, 0, ROI, accumulate=2)
    for a, b in zip(Sampler(volumes, one)(3), Sampler(volumes, two)(3), strict=True):
        assert torch.equal(a, b)
    at_once, in_parts = small_network(), small_network()
    losses = [train(model, volumes, plan, tmp_path / str(plan.accumulate)).losses
              for model, plan in ((at_once, one), (in_parts, two))]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert train(small_network(), volumes, Plan(4, 2, 1e-2, 0, ROI), tmp_path / "half").losses != losses[1]


def drawn(volumes: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sampler = Sampler(volumes, Plan(6, 1, 1e-3, 0, ROI, **options))
    return [sampler(step) for step in range(6)]


def test_each_augmentation_changes_what_it_says(volumes: Any) -> None:
    none, intensity, full = (drawn(volumes, augment=kind) for kind in ("none", "intensity", "full"))
    flipped = drawn(volumes, augment="intensity", flips=True)
    same = {"images": 0, "labels": 0, "deformed": 0, "flipped": 0}
    for (image, label), (i_image, i_label), (_, f_label), (flip, _) in zip(none, intensity, full, flipped, strict=True):
        assert torch.equal(label, i_label)
        same["images"] += torch.equal(image, i_image)
        same["deformed"] += torch.equal(label, f_label)
        axes = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
        matches = [torch.equal(i_image.flip(own), flip) for own in axes]
        assert sum(matches) == 1
        same["flipped"] += not matches[0]
    assert same["images"] < 6
    assert same["deformed"] < 6
    assert same["flipped"] > 0
    values = torch.cat([torch.as_tensor(volume.image).flatten() for volume in volumes])
    assert all(torch.isin(image, values).all() for image, _ in none)  # crops of the volumes as they are
    assert not any(torch.isin(image, values).all() for image, _ in full[:1])


def test_class_weights_are_those_of_both_losses() -> None:
    logits, labels = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 1, 4, 4, 4))
    weights = (0.5, 1.0, 3.0)
    plain, weighted = segmentation_loss(), segmentation_loss(weights)
    entropy = nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits, labels[:, 0])
    shares = logits.softmax(1)
    truth = nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    overlap = 2 * (shares * truth).sum((2, 3, 4)) + 1e-5
    dice = 1 - overlap / (shares.sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1e-5)
    expected = entropy + (dice[0, 1:] * torch.tensor(weights[1:])).mean()
    assert weighted(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain(logits, labels).item() != pytest.approx(expected.item(), rel=1e-2)


# -- selection --------------------------------------------------------------------------------------------------------


def scripted(scores: list[float], kept: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], float]:
    def select(model: nn.Module) -> float:
        kept.append({name: parameter.detach().clone() for name, parameter in trainable(model).items()})
        return scores[len(kept) - 1]

    return select


def test_the_best_weights_are_kept_and_training_stops_when_they_are_no_longer_beaten(
    volumes: Any, tmp_path: Path
) -> None:
    scores = [math.nan, 0.2, 0.6, 0.5, math.nan, 0.9, 0.1]
    for select, patience, done, chosen in (("best", 0, 7, 5), ("best", 2, 5, 2), ("last", 2, 5, 4), ("last", 0, 7, 6)):
        kept: list[dict[str, torch.Tensor]] = []
        plan = Plan(7, 1, 1e-2, 0, ROI, select=select, patience=patience, select_every=1)
        model, folder = small_network(), tmp_path / f"{select}{patience}"
        progress = train(model, volumes, plan, folder, select=scripted(scores, kept), validate=lambda model: 0.5)
        assert (progress.step, progress.stopped) == (done, done < 7)
        assert progress.curve == [[0, 0.5], [done, 0.5]]  # also where patience has ended it
        for name, parameter in trainable(model).items():
            assert torch.equal(parameter, kept[chosen][name])
        before, *rows = read_csv(folder / "metrics.csv")
        assert (before["step"], before["loss"], before["val_dice"]) == ("0", "", "0.5")
        assert [row["select_dice"] for row in rows] == [str(s) for s in scores[:done]]


def test_cases_are_held_out_of_the_training_and_are_not_those_reported_on(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, scored = set(), set()
    train_, mean_dice = loop.Sampler.__init__, evaluation.mean_dice

    def sampler(self: Any, volumes: Any, plan: Plan) -> None:
        trained.update(volume.name for volume in volumes)
        train_(self, volumes, plan)

    def dice(model: nn.Module, volumes: Any, config: NetworkConfig) -> float:
        scored.add(tuple(volume.name for volume in volumes))
        return mean_dice(model, volumes, config)

    monkeypatch.setattr(loop.Sampler, "__init__", sampler)
    monkeypatch.setattr(evaluation, "mean_dice", dice)
    out = tmp_path / "run"
    finetune(settings(methods=("head", "tcur-learned:rank=1:warm_up=2"), steps=2, select="best"), out)
    run = read_json(out / "run.json")
    held, kept = (set(run["selection"][part]) for part in ("held_out", "train"))
    assert len(held) == 1  # a fifth of three cases, and at least one
    assert held | kept == set(run["data"]["train"])
    assert trained == kept == set(run["data"]["train"]) - held  # the warm-up too
    assert scored == {tuple(held), tuple(run["data"]["val"])}
    assert (run["settings"]["select"], run["settings"]["augment"]) == ("best", "full")
    assert f"<td>{next(iter(held))}</td>" in (out / "report.html").read_text().replace(" class=l", "")
    assert run["augmentation"]["transforms"][0]["name"] == "RandAffined"


def test_pretraining_holds_out_too(pristine_data: Path, tmp_path: Path) -> None:
    pretrain(
        PretrainSettings(
            pristine_data, sizes=SMALL, roi=ROI, steps=4, select="best", select_every=1, patience=3, accumulate=2,
            amp="bf16", class_weights=(1.0, 2.0, 2.0),
        ), tmp_path / "base",
    )  # fmt: skip
    assert len(read_json(tmp_path / "base/run.json")["selection"]["held_out"]) == 1
    assert all(row["select_dice"] for row in read_csv(tmp_path / "base/metrics.csv")[1:])


def test_subjects_are_not_divided() -> None:
    names = ["sub-01_ses-1", "sub-02_ses-1", "sub-01_ses-2", "sub-03", "other_1", "other_2"]
    assert by_subject(names, None) == [[0, 2], [1], [3], [4], [5]]
    assert by_subject(names, r"^(other)") == [[0], [1], [2], [3], [4, 5]]
    for count in (2, 3, 5):
        parts = folds(names, count, 0, None)
        assert sorted(index for part in parts for index in part) == list(range(6))
        assert any({0, 2} <= set(part) for part in parts)
    seen = set()
    for seed in range(8):
        kept, held = hold_out(names, SimpleNamespace(subject_pattern=None, select_fraction=0.4, data_seed=seed))
        assert sorted(kept + held) == list(range(6))
        assert (0 in held) == (2 in held)
        seen.add(tuple(held))
    assert len(seen) > 1


# -- killed and resumed -----------------------------------------------------------------------------------------------

OPTIONS = {"methods": ("head", "tcur"), "steps": 8, "rank": 4, "checkpoint_every": 2, "lr": {"head": 0.3, "tcur": 0.3},
           "augment": "full", "flips": True, "accumulate": 2, "select": "best", "select_every": 1}  # fmt: skip
KILL = f"""
import os, signal, sys
from pathlib import Path
from tcurlora_ext.io.table import terminal
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display

rename, seen = Path.replace, []
def replace(self, target):
    if Path(target).parent.parent.name == "tcur" and Path(target).name == "checkpoint.pt":
        seen.append(target)
        if len(seen) == 4:  # that of step 8 is written and not renamed
            os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
finetune(FinetuneSettings(Path(sys.argv[1]), Path(sys.argv[2]), **{OPTIONS!r}), Path(sys.argv[3]),
         display=Display(terminal()))
"""


def test_a_killed_run_with_augmentation_accumulation_and_selection_is_resumed_bit_for_bit(
    pristine_data: Path, base: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "run", FinetuneSettings(pristine_data, base, **OPTIONS)  # type: ignore[arg-type]
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(pristine_data), str(base), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums of the same bits
        capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert "tcur, seed 0: step 6 of 8, loss " in killed.stdout.decode()  # a pipe gets lines, and each is flushed
    left = read_checkpoint(out / "tcur/seed0/checkpoint.pt")
    best = left["selection"]["best"]
    assert left["step"] == 6
    finetune(settings, out, resume=True)
    finetune(settings, tmp_path / "whole")
    names = sorted(
        path.relative_to(out) for path in out.rglob("*")
        if path.suffix == ".safetensors" or path.name in ("cases.csv", "overlays.png")
    )  # fmt: skip
    assert len(names) >= 6
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    curve = [float(row["select_dice"]) for row in read_csv(out / "tcur/seed0/metrics.csv")[1:]]
    assert read_csv(out / "tcur/seed0/metrics.csv") == read_csv(tmp_path / "whole/tcur/seed0/metrics.csv")
    # the weights that are kept are those of before the kill, which only the checkpoint has
    assert curve.index(max(curve)) + 1 == best["step"] < 6


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_lets_the_step_end_and_saves_it(volumes: Any, tmp_path: Path) -> None:
    plan = Plan(6, 1, 1e-2, 0, ROI, checkpoint_every=50)
    whole = small_network()
    train(whole, volumes, plan, tmp_path / "whole")

    def press(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small_network(), volumes, plan, tmp_path / "parts", on_step=press)
    assert read_checkpoint(tmp_path / "parts/checkpoint.pt")["step"] == 3  # pressed when the second was done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = small_network()
    train(resumed, volumes, plan, tmp_path / "parts")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "fp8"}, "amp: found 'fp8', expected one of off, bf16, fp16"),
        ({"augment": "some"}, "augment: found 'some', expected one of none, intensity, full"),
        ({"augment": "none", "flips": True}, "flips: found them with augment none"),
        ({"select": "first"}, "select: found 'first'"),
        ({"select": "best", "train_list": "one"}, "found 1 training subject, expected two or more"),
        ({"patience": 1, "subject_pattern": "^(case)"}, "found 1 training subject, expected two or more"),
        ({"subject_pattern": "case"}, "subject-pattern: found 'case' without a group"),
        ({"select_fraction": 1.0}, "select-fraction: found 1.0"),
        ({"select_every": 0}, "select-every: found 0, expected 1 or more"),
        ({"patience": -1}, "patience: found -1"),
        ({"accumulate": 0}, "accumulate: found 0, expected 1 or more"),
        ({"workers": -1}, "workers: found -1"),
        ({"class_weights": (1.0, 2.0)}, "class-weights: found 1,2, expected 3 numbers"),
        ({"class_weights": (0.0, 0.0, 0.0)}, "class-weights: found 0,0,0"),
        ({"class_weights": (1.0, -1.0, 1.0)}, "class-weights: found 1,-1,1"),
        ({"log": ("paper",)}, "log: found 'paper', expected some of tensorboard, mlflow"),
        ({"log": ("mlflow",)}, "log: the package 'mlflow' is not installed"),
        ({"tune": True, "trials": 0}, "trials: found 0"),
        ({"tune": True, "tune_over": ("batch",)}, "tune-over: found batch"),
        ({"tune": True, "tune_folds": 4}, "tune-folds: found 3 training subjects, expected at least 4"),
        ({"tune": True, "tune_folds": 2, "select": "best"}, "found 1 training subject"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_written(
    changes: dict[str, Any], message: str, settings: Callable[..., FinetuneSettings], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(ValueError, match=r"expected|not installed") as raised:
        finetune(settings(**changes), tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_cache_is_named(settings: Callable[..., FinetuneSettings], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="cache: found the file"):
        finetune(settings(cache=tmp_path / "cache"), tmp_path / "run")


def test_a_cache_that_cannot_be_written_to_is_named(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"cache: found {tmp_path}, which cannot be written to"):
        finetune(settings(cache=tmp_path / "a" / "cache"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_new_settings_is_resumed_and_others_are_refused(
    settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    chosen = settings(methods=("head",), steps=1)
    finetune(chosen, out)
    run = read_json(out / "run.json")
    new = ("amp", "cache", "workers", "augment", "flips", "class_weights", "accumulate", "select", "patience",
           "select_fraction", "select_every", "subject_pattern", "log", "tune", "trials", "tune_over",
           "tune_folds")  # fmt: skip
    del run["augmentation"]
    run["settings"] = {name: value for name, value in run["settings"].items() if name not in new}
    write_json(out / "run.json", run)
    before = (out / "head/seed0/adapter.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the run has accumulate = 1, found 2 now"):
        finetune(settings(methods=("head",), steps=1, accumulate=2), out, resume=True)
    finetune(settings(methods=("head",), steps=1, workers=1, cache=tmp_path / "cache"), out, resume=True)
    assert (out / "head/seed0/adapter.safetensors").read_bytes() == before
