"""Hippocampus segmentation from five subjects: adapters compared with training the output head alone.

A ViT segmenter without skip connections, so that every prediction passes through its transformer, is pretrained to
segment the hippocampus on synthetic T1-like crops made from label maps. It is then adapted by each method to real MRI
of five subjects, whose labels of the anterior and the posterior part are merged into one class.

    python -m tcurlora_ext.bench.hippocampus SYNTHSEG_MAPS HIPPOCAMPUS WORK RESULTS [--seeds 3]

A run that was stopped resumes when it is started again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from tcurlora_ext.bench.entry import run_command
from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display

LEFT_HIPPOCAMPUS = 17  # FreeSurfer's value; right-sided crops are mirrored to the left
DRAWS = 2  # images of each crop
VALIDATION_SUBJECTS = 3
PLACES = ("data", "pretrained", "subject_file", "factors", "cache")  # settings that are paths
# Windows of 2 mm voxels, and sizes that differ from the network's own: UNETR's transformer is as wide as the ViT's.
ROI = {"vit": (24, 32, 24), "dynunet": (24, 32, 24), "segresnet": (24, 32, 24)}
WIDE_ROI = (32, 32, 32)
SIZES = {"unetr": {"hidden_size": 128, "mlp_dim": 512, "num_heads": 4}}
WINDOW = (42, 58, 44)  # voxels of 1 mm around the hippocampus; the real data are crops of at most 43x59x47


def make_source(maps: Path, folder: Path) -> None:
    """Write T1-like images of the crops in the Decathlon's layout; no subject is in both training and validation.

    Each crop's centre is moved by up to 3 mm. Each class's mean and standard deviation are drawn from the priors, its
    voxels from that Gaussian; the image is then blurred by a Gaussian of 0.7 mm.
    """
    import nibabel as nib
    from scipy.ndimage import gaussian_filter

    crops = np.load(maps / "hip_crops.npz")
    classes = np.load(maps / "generation_classes_contrast_specific.npy")
    means, sds = np.load(maps / "prior_means_t1.npy"), np.load(maps / "prior_stds_t1.npy")
    target = int(np.where(crops["generation_labels"] == LEFT_HIPPOCAMPUS)[0][0])
    held_out = set(np.unique(crops["subject"])[-VALIDATION_SUBJECTS:].tolist())
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for index, labels in enumerate(crops["labels"]):
        for draw in range(1 if crops["subject"][index] in held_out else DRAWS):
            rng = np.random.default_rng([index, draw])
            mean, sd = rng.normal(means[0], means[1]), np.abs(rng.normal(sds[0], sds[1]))
            shown = labels[cut(labels == target, rng)]
            kinds = classes[shown]
            image = gaussian_filter(rng.normal(mean[kinds], sd[kinds]), 0.7).astype(np.float32)
            name = f"crop_{index:02d}_{draw}"
            for part, volume in (("imagesTr", image), ("labelsTr", (shown == target).astype(np.uint8))):
                nifti = nib.Nifti1Image(volume, np.eye(4))
                write_with(folder / part / f"{name}.nii.gz", partial(nib.save, nifti))
            lists["val" if crops["subject"][index] in held_out else "train"].append(name)
    write_json(folder / "dataset.json", {"labels": {"0": "background", "1": "hippocampus"}})
    write_json(folder / "splits.json", lists)


def make_target(data: Path, folder: Path, parts: Sequence[int] = (1, 2)) -> None:
    """Write the real data with these parts of the hippocampus as one class; images and splits are copied."""
    import nibabel as nib

    (folder / "labels").mkdir(parents=True, exist_ok=True)
    shutil.copytree(data / "images", folder / "images", dirs_exist_ok=True)
    for path in sorted((data / "labels").glob("*.nii.gz")):
        truth = nib.load(path)
        merged = nib.Nifti1Image(np.isin(np.asarray(truth.dataobj), parts).astype(np.uint8), truth.affine)
        write_with(folder / "labels" / path.name, partial(nib.save, merged))
    write_json(folder / "dataset.json", {"labels": {"0": "background", "1": "hippocampus"}})
    write_json(folder / "splits.json", read_json(data / "splits.json"))


def cut(mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """The slices of a window around the centre of the mask's bounding box, moved at random."""
    where = np.argwhere(mask)
    centre = (where.min(0) + where.max(0) + 1) // 2 + rng.integers(-3, 4, 3)
    low = [int(np.clip(c - w // 2, 0, n - w)) for c, w, n in zip(centre, WINDOW, mask.shape, strict=True)]
    return tuple(slice(a, a + w) for a, w in zip(low, WINDOW, strict=True))


def hippocampus(
    maps: Annotated[Path, typer.Argument(metavar="SYNTHSEG_MAPS", help="Holds hip_crops.npz and the contrast priors.")],
    data: Annotated[Path, typer.Argument(metavar="HIPPOCAMPUS", help="Holds images/, labels/ and splits.json.")],
    work: Annotated[Path, typer.Argument(metavar="WORK", help="Folder for data, the pretrained network and runs.")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Gets summary.csv, metrics.csv and run.json.")],
    methods: Annotated[str, typer.Option(help="Comma separated.")] = "head,lora,tcur",
    seeds: Annotated[int, typer.Option(help="Runs per method.")] = 3,
    steps: Annotated[int, typer.Option(help="Of adapting.")] = 120,
    pretrain_steps: Annotated[int, typer.Option(help="Of pretraining.")] = 600,
    train_list: Annotated[str, typer.Option(help="Of splits.json.")] = "5_subjects_seed0",
    val_list: Annotated[str, typer.Option(help="Of splits.json.")] = "val",
    run: Annotated[str, typer.Option(help="Name of the run's folder in WORK.")] = "finetune",
    lr: Annotated[str, typer.Option(help='JSON, e.g. {"tcur": 3e-3}. Default: a rate per method.')] = "{}",
) -> None:
    """Pretrain a segmenter on synthetic hippocampi, adapt it to real MRI by several methods, copy the results."""
    display = Display(Console(width=120))
    base, target = prepare(maps, data, work, pretrain_steps, display)
    adapting = FinetuneSettings(
        target, base, methods=tuple(methods.split(",")), seeds=seeds, steps=steps,
        lr=json.loads(lr), train_list=train_list, val_list=val_list,
    )  # fmt: skip
    finetune(adapting, work / run, resume=True, display=display)
    publish(work / run, results)


def pretrain_folder(work: Path, network: str) -> Path:
    """Where the pretrained network of this name is."""
    return work / ("pretrain" if network == "vit" else f"pretrain-{network}")


def prepare(
    maps: Path, data: Path, work: Path, pretrain_steps: int, display: Display, network: str = "vit"
) -> tuple[Path, Path]:
    """Weights pretrained on synthetic crops, and the folder of the real data: made in WORK unless they are there."""
    source, target, base = work / "source", work / "target", pretrain_folder(work, network)
    if not (source / "splits.json").is_file():
        make_source(maps, source)
    if not (base / "transformer.json").is_file():
        settings = PretrainSettings(
            source, network=network, sizes=SIZES.get(network, {}), roi=ROI.get(network, WIDE_ROI),
            spacing=(2.0, 2.0, 2.0), steps=pretrain_steps,
        )  # fmt: skip
        pretrain(settings, base, resume=True, display=display)
    if not (target / "splits.json").is_file():
        make_target(data, target)
    return base / "base.safetensors", target


def publish(run: Path, results: Path) -> None:
    """Copy the small files of a run: its tables, and settings and versions together with the commit and the command."""
    copy_results(run, results, ("summary.csv", "metrics.csv", "transformer.json"))


def copy_results(run: Path, results: Path, names: Sequence[str]) -> None:
    """Copy files of a run, and run.json with the commit and the command."""
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(run / name, results / name)
    description = read_json(run / "run.json")
    settings = description["settings"]
    for key in PLACES:  # they have no effect on the result
        if settings.get(key) is not None:
            settings[key] = Path(settings[key]).name
    settings["methods"] = [re.sub("=/[^:]*/", "=", method) for method in settings["methods"]]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    write_json(results / "run.json", {**description, "commit": commit, "arguments": words})


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(hippocampus, arguments, "python -m tcurlora_ext.bench.hippocampus")


if __name__ == "__main__":
    sys.exit(main())
