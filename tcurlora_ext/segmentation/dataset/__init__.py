"""Data sets: layouts of folders, cases and classes, checks of files, and volumes as a network gets them."""

from .reading import (
    IGNORED,
    Case,
    DataOptions,
    SegmentationDataset,
    Volume,
    load_label,
    load_volumes,
    read_dataset,
    with_label_values,
)

__all__ = [
    "IGNORED",
    "Case",
    "DataOptions",
    "SegmentationDataset",
    "Volume",
    "load_label",
    "load_volumes",
    "read_dataset",
    "with_label_values",
]
