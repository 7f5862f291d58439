"""Reading a case as a transform of MONAI, for its datasets. The module needs MONAI when it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import Transform

from tcurlora_ext.segmentation.dataset.reading import Case, Volume, load_volumes

AFFINE = ".affine"  # after a tensor's name: its affine


class ReadCase(Transform):  # type: ignore[misc]  # MONAI is not followed by mypy
    """From the index of a case to its prepared volume, as a dictionary of plain tensors and values.

    Args:
        cases: The cases.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.
    """

    def __init__(self, cases: Sequence[Case], spacing: Sequence[float] | None) -> None:
        self.cases, self.spacing = tuple(cases), spacing

    def __call__(self, index: int) -> dict[str, Any]:
        (volume,) = load_volumes([self.cases[index]], self.spacing)
        return to_plain(volume)


def to_plain(volume: Volume) -> dict[str, Any]:
    """The fields of a volume; MONAI's metadata are left out but for the affines, which are entries of their own."""
    found: dict[str, Any] = {}
    for field in fields(volume):
        value = getattr(volume, field.name)
        if isinstance(value, MetaTensor):
            found[field.name + AFFINE] = value.affine
            value = value.as_tensor()
        found[field.name] = value
    return found


def from_plain(content: dict[str, Any]) -> Volume:
    """The inverse of :func:`to_plain`."""
    values = {name: value for name, value in content.items() if not name.endswith(AFFINE)}
    for name in values:
        if name + AFFINE in content:
            values[name] = MetaTensor(values[name], affine=content[name + AFFINE])
    return Volume(**values)


class FileNames:
    """The names of prepared volumes by index, as MONAI's PersistentDataset asks for them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, index: int) -> bytes:
        return self.names[index].encode()
