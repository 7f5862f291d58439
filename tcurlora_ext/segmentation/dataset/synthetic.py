"""The embedded data: subjects made from the MNI152 T1 template and its tissue maps, which nilearn's wheel contains.

The anatomy is real, the subjects are synthetic. Tissue maps p_c on a 2 mm grid (grey matter, white matter, and the rest
of the brain, mostly CSF) are deformed smoothly and at random, smooth random fields change the proportions of the
tissues (a thinner or thicker cortex, larger ventricles), and an image is computed from them:

    image = bias · (Σ_c p_c · mean_c + texture · residual) + noise,        labels = argmax_c p_c

The labels are grey and white matter, for which the wheel has maps. The rest has an intensity of its own but is labelled
background, because at the brain's edge it is partial volume rather than a tissue.

`residual` is the T1 template minus its own tissue means: it keeps the structure inside a tissue. The source domain has
T1's order of means (white > grey > CSF); the target domain has the reverse order, as in T2, with a stronger bias field
and more noise. The files are written in the Medical Decathlon layout, so that the reader of user data reads them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import write_json
from tcurlora_ext.segmentation.packages import require_package

Array = NDArray[np.float32]

LABELS = {0: "background and CSF", 1: "grey matter", 2: "white matter"}
FINE = 2.0  # mm, voxel size at which the template is read


@dataclass(frozen=True)
class Domain:
    """An image contrast, with intensities on a scale of 0 to 1.

    Attributes:
        means: Mean intensities of background, grey matter, white matter and CSF.
        mean_sd: Standard deviation of these means over subjects.
        texture: Factor on the T1 template's residual.
        bias_sd: Standard deviation of the logarithm of the bias field.
        noise_sd: Standard deviation of the noise.
    """

    means: tuple[float, float, float, float]
    mean_sd: float
    texture: float
    bias_sd: float
    noise_sd: float


# Why the target is noisy: training the head alone can swap two contrasts, which is a linear map of the last features,
# but cannot average noise over a voxel's neighbours. It reaches 70 % Dice at noise 0.05 and 62 % at 0.10.
DOMAINS = {
    "source": Domain((0.0, 0.55, 0.85, 0.22), mean_sd=0.03, texture=1.0, bias_sd=0.06, noise_sd=0.02),
    "target": Domain((0.0, 0.60, 0.38, 0.90), mean_sd=0.04, texture=-0.5, bias_sd=0.25, noise_sd=0.10),
}


@lru_cache(maxsize=1)
def template() -> tuple[Array, Array]:
    """Tissue maps (4, X, Y, Z) that sum to 1, and the T1 residual (X, Y, Z), both at 2 mm and cropped to the brain.

    They are read from the installed files of nilearn; nothing is downloaded.
    """
    require_package("nilearn")
    from nilearn import datasets

    t1, grey, white = (
        np.asarray(load(resolution=int(FINE)).get_fdata(), dtype=np.float32)
        for load in (
            datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template,
        )
    )  # fmt: skip
    brain = (t1 > 0.05).astype(np.float32)  # skull-stripped; interpolation leaves values near 0 outside
    grey, white = grey.clip(0, 1) * brain, white.clip(0, 1) * brain
    total = np.maximum(grey + white, 1.0)
    grey, white = grey / total, white / total
    maps = np.stack([1 - brain, grey, white, brain - grey - white]).clip(0, 1)
    means = [(t1 * p).sum() / p.sum() for p in maps]
    residual = (t1 - sum(mean * p for mean, p in zip(means, maps, strict=True))) * brain
    where = np.argwhere(brain > 0)
    low, high = where.min(0), where.max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return maps[(slice(None), *box)].astype(np.float32), residual[box].astype(np.float32)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """A Gaussian random field of mean 0 and standard deviation 1, smoothed over `sigma` voxels."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)


def _coordinates(rng: np.random.Generator, shape: tuple[int, ...], spacing: float, fine: tuple[int, ...]) -> Array:
    """Where each output voxel samples the template: (3, X, Y, Z), in voxels of the template.

    An affine map (scaling by up to 8 %, rotation by up to 6 degrees, shifts of up to 6 mm) and two smooth random
    deformations, of 3 mm standard deviation over a length of 32 mm and of 1.5 mm over 10 mm. This is how much adult
    brains differ after a linear alignment.
    """
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    centred = (grid - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2) * spacing  # mm from the centre
    angles = np.deg2rad(rng.uniform(-6, 6, 3))
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    matrix = rotation @ np.diag(rng.uniform(0.92, 1.08, 3))
    moved = np.einsum("ij,jxyz->ixyz", matrix, centred) + rng.uniform(-6, 6, 3).reshape(3, 1, 1, 1)
    for amplitude, width in ((3.0, 32.0), (1.5, 10.0)):
        moved += amplitude * np.stack([_smooth_field(rng, shape, width / 2 / spacing) for _ in range(3)])
    return np.asarray(moved / FINE + (np.array(fine).reshape(3, 1, 1, 1) - 1) / 2, dtype=np.float32)


def make_subject(domain: str, seed: int, index: int, spacing: float = 4.0) -> tuple[Array, NDArray[np.uint8]]:
    """Make one subject; the same arguments always give the same one.

    Args:
        domain: "source" or "target".
        seed: Of the data set.
        index: Of the subject.
        spacing: Voxel size in mm; 4 mm gives 42 x 50 x 44 voxels, which includes a margin for the deformation.

    Returns:
        The image (X, Y, Z) in float32, and the labels of the same shape.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    settings = DOMAINS[domain]
    rng = np.random.default_rng([seed, list(DOMAINS).index(domain), index])
    maps, residual = template()
    margin = 10.0  # mm on each side
    shape = tuple(int(np.ceil((n * FINE + 2 * margin) / spacing)) for n in maps.shape[1:])
    where = _coordinates(rng, shape, spacing, maps.shape[1:])
    blur = 0.4 * spacing / FINE  # as the larger voxels would blur, so that sampling does not alias
    outside = (1.0, 0.0, 0.0, 0.0)
    warped = np.stack([
        map_coordinates(gaussian_filter(p, blur, mode="nearest"), where, order=1, cval=value)
        for p, value in zip(maps, outside, strict=True)
    ])  # fmt: skip
    detail = map_coordinates(gaussian_filter(residual, blur), where, order=1, cval=0.0)
    for tissue in (1, 2, 3):  # log-odds of grey matter, white matter and CSF vary by 0.4, over lengths of 30 mm
        warped[tissue] *= np.exp(0.4 * _smooth_field(rng, shape, 15.0 / spacing))
    warped /= warped.sum(0).clip(1e-6)
    means = np.array(settings.means) + rng.normal(0, settings.mean_sd, 4) * (np.arange(4) > 0)
    image = np.einsum("c,cxyz->xyz", means, warped) + settings.texture * detail
    image *= np.exp(settings.bias_sd * _smooth_field(rng, shape, 40.0 / spacing))
    image += rng.normal(0, settings.noise_sd, shape)
    labels = warped.argmax(0)
    labels[labels == 3] = 0
    return image.astype(np.float32), labels.astype(np.uint8)


def write_domain(
    folder: Path, domain: str, train: int, val: int, seed: int = 0, spacing: float = 4.0
) -> Path:  # fmt: skip
    """Make `train` + `val` subjects of a domain and write them to a folder in the Medical Decathlon layout.

    `splits.json` is written last: a folder that has it is complete. A second call writes the same files again.
    """
    import nibabel as nib

    affine = np.diag([spacing, spacing, spacing, 1.0])
    names = [f"brain_{index:03d}" for index in range(train + val)]
    for index, name in enumerate(names):
        image, labels = make_subject(domain, seed, index, spacing)
        for part, volume in (("imagesTr", image), ("labelsTr", labels)):
            nifti = nib.Nifti1Image(volume, affine)
            write_with(folder / part / f"{name}.nii.gz", partial(nib.save, nifti))
    write_json(folder / "dataset.json", {
        "name": f"MNI152 {domain}",
        "description": "subjects made from the MNI152 template by random deformation, contrast, bias field and noise",
        "modality": {"0": "T1-like" if domain == "source" else "T2-like"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": len(names),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names
        ],
    })  # fmt: skip
    write_json(folder / "splits.json", {"train": names[:train], "val": names[train:]})
    return folder
