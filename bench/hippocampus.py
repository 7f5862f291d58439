"""Hippocampus from five subjects: adapters against the head alone, in a network that needs its transformer.

A plain ViT segmenter is pretrained on synthetic T1-like crops made from label maps, label hippocampus, then adapted to
real MRI with labels of its anterior and posterior parts, five subjects of the few-shot list, by every method asked for.

    python bench/hippocampus.py SYNTHSEG_MAPS HIPPOCAMPUS WORK RESULTS [--methods head,lora,tcur] [--seeds 3]

SYNTHSEG_MAPS holds hip_crops.npz and the contrast priors, HIPPOCAMPUS images/, labels/ and splits.json. Runs go on
where they stopped. RESULTS gets summary.csv, metrics.csv and run.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.run import FinetuneSettings, finetune
from tcurlora_ext.segmentation.terminal import Display

LEFT_HIPPOCAMPUS = 17  # FreeSurfer's value; right-sided crops are mirrored to the left
DRAWS = 2  # images of each crop
VALIDATION_SUBJECTS = 3
WINDOW = (42, 58, 44)  # mm = voxels, cut out around the hippocampus, as the real data are crops of at most 43x59x47


def make_source(maps: Path, folder: Path) -> None:
    """Write T1-like images of the crops in the Decathlon layout; subjects of training and validation apart.

    Each centre is moved by up to 3 mm. A class's mean and standard deviation are drawn from the priors, voxels
    from that Gaussian, blurred by 0.7 mm.
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


def make_target(data: Path, folder: Path) -> None:
    """The real data with its two parts of the hippocampus as one class; images and lists as they are."""
    import nibabel as nib

    (folder / "labels").mkdir(parents=True, exist_ok=True)
    shutil.copytree(data / "images", folder / "images", dirs_exist_ok=True)
    for path in sorted((data / "labels").glob("*.nii.gz")):
        parts = nib.load(path)
        whole = nib.Nifti1Image((np.asarray(parts.dataobj) > 0).astype(np.uint8), parts.affine)
        write_with(folder / "labels" / path.name, partial(nib.save, whole))
    write_json(folder / "dataset.json", {"labels": {"0": "background", "1": "hippocampus"}})
    write_json(folder / "splits.json", read_json(data / "splits.json"))


def cut(mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A window around the centre of the mask's bounding box, moved at random."""
    where = np.argwhere(mask)
    centre = (where.min(0) + where.max(0) + 1) // 2 + rng.integers(-3, 4, 3)
    low = [int(np.clip(c - w // 2, 0, n - w)) for c, w, n in zip(centre, WINDOW, mask.shape, strict=True)]
    return tuple(slice(a, a + w) for a, w in zip(low, WINDOW, strict=True))


def main() -> None:
    """Make the source, pretrain, adapt, copy the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("maps", "data", "work", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--methods", default="head,lora,tcur")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--train-list", default="5_subjects_seed0")
    parser.add_argument("--val-list", default="val")
    parser.add_argument("--run", default="finetune", help="name of the run's folder under WORK")
    parser.add_argument("--lr", default="{}", help='JSON, e.g. {"tcur": 3e-3}; default: per method')
    options = parser.parse_args()
    display = Display(Console(width=120))
    source, base = options.work / "source", options.work / "pretrain"
    if not (source / "splits.json").is_file():
        make_source(options.maps, source)
    if not (base / "transformer.json").is_file():
        pretrain(
            PretrainSettings(source, roi=(24, 32, 24), spacing=(2.0, 2.0, 2.0), steps=options.pretrain_steps),
            base,
            resume=True,
            display=display,
        )
    target = options.work / "target"
    if not (target / "splits.json").is_file():
        make_target(options.data, target)
    run = options.work / options.run
    finetune(
        FinetuneSettings(
            target,
            base / "base.safetensors",
            methods=tuple(options.methods.split(",")),
            seeds=options.seeds,
            steps=options.steps,
            lr=json.loads(options.lr),
            train_list=options.train_list,
            val_list=options.val_list,
        ),
        run,
        resume=True,
        display=display,
    )
    publish(run, options.results)


def publish(run: Path, results: Path) -> None:
    """Copy what is small: tables, the transformer check, settings and versions with the commit and the command."""
    results.mkdir(parents=True, exist_ok=True)
    for name in ("summary.csv", "metrics.csv", "transformer.json"):
        shutil.copy(run / name, results / name)
    description = read_json(run / "run.json")
    for key in ("data", "pretrained"):  # where the files lay says nothing about the result
        if description["settings"][key] is not None:
            description["settings"][key] = Path(description["settings"][key]).name
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    write_json(results / "run.json", {**description, "commit": commit, "arguments": words})


if __name__ == "__main__":
    main()
