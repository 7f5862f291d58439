"""Plain folders: `imagesTr/` and `labelsTr/`, or `images/` and `labels/`, in which a case's files have one name."""

from __future__ import annotations

from pathlib import Path

from .files import Files, find_folder, volumes


def read_folders(root: Path) -> Files:
    """The files of two folders by their names.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: Two files have the same name but for the suffix.
    """
    images, labels = find_folder(root, "imagesTr", "images"), find_folder(root, "labelsTr", "labels")
    return Files({name: (path,) for name, path in volumes(images).items()}, volumes(labels), images, labels)
