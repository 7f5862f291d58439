"""The volumes of a run: all in memory, or prepared once into a folder and read one by one, by MONAI's datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from tcurlora_ext.segmentation.dataset.reading import Case, Volume
from tcurlora_ext.segmentation.packages import require_package

# Part of the name of a prepared volume: to be raised with every change of how volumes are prepared.
PREPARATION = 1


class Volumes(Sequence[Volume]):
    """The volumes of cases, in their order. A slice or :meth:`part` has the same volumes, not copies.

    Attributes:
        names: Of the cases.
        on_disk: Whether a volume is read each time that it is asked for, and not kept.
    """

    def __init__(self, dataset: Any, cases: Sequence[Case], files: Sequence[Path], chosen: Sequence[int]) -> None:
        self._dataset, self._cases, self._files, self._chosen = dataset, cases, files, tuple(chosen)
        self.names = tuple(cases[index].name for index in self._chosen)
        self.on_disk = bool(files)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Volume: ...

    @overload
    def __getitem__(self, index: slice) -> Volumes: ...

    def __getitem__(self, index: int | slice) -> Volume | Volumes:
        if isinstance(index, slice):
            return self.part(range(len(self))[index])
        return self._read(self._chosen[index])

    def __iter__(self) -> Iterator[Volume]:
        return (self._read(index) for index in self._chosen)

    def part(self, indices: Sequence[int]) -> Volumes:
        """The volumes at these places."""
        return Volumes(self._dataset, self._cases, self._files, [self._chosen[index] for index in indices])

    def _read(self, index: int) -> Volume:
        from tcurlora_ext.segmentation.dataset.transform import from_plain

        try:
            return from_plain(self._dataset[index])
        except (RuntimeError, EOFError) as error:
            if error.__cause__ is not None:  # what the reader raised, in an error of MONAI's
                raise error.__cause__ from None
            if not self.on_disk:
                raise
            if not self._files[index].is_file():
                raise OSError(f"{self._files[index]}: the prepared volume cannot be written ({error})") from error
            self._files[index].unlink()  # a kill has left it incomplete: it is prepared again
            return from_plain(self._dataset[index])


def open_volumes(cases: Sequence[Case], spacing: Sequence[float] | None, cache: Path | None = None) -> Volumes:
    """The volumes of cases, prepared as :func:`~tcurlora_ext.segmentation.dataset.reading.load_volumes` says.

    Args:
        cases: Checked, as those of :func:`~tcurlora_ext.segmentation.dataset.reading.read_dataset` are.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.
        cache: None reads all volumes now and keeps them in memory (MONAI's CacheDataset). A folder: a volume is
            prepared when it is first asked for, written there and read again each time (MONAI's PersistentDataset).
            The files' names are digests of the case's files and of the preparation, so that runs can share a folder.

    Raises:
        ValueError: Normalisation overflows float32.
    """
    require_package("monai")
    from monai.data.dataset import CacheDataset, PersistentDataset

    from tcurlora_ext.segmentation.dataset.transform import FileNames, ReadCase

    read, everything = ReadCase(cases, spacing), range(len(cases))
    if cache is None:
        kept = CacheDataset(everything, read, num_workers=1, progress=False, runtime_cache=True, copy_cache=False)
        volumes = Volumes(kept, cases, (), everything)
        for _ in volumes:  # read here and now: MONAI would do it in a thread, which may have other CPU threads
            pass
        return volumes
    names = [_digest(case, spacing) for case in cases]
    stored = PersistentDataset(everything, read, cache, hash_func=FileNames(names))
    return Volumes(stored, cases, [cache / f"{name}.pt" for name in names], everything)


def _digest(case: Case, spacing: Sequence[float] | None) -> str:
    import monai

    how = (PREPARATION, monai.__version__, None if spacing is None else tuple(spacing), case)
    digest = hashlib.sha256(repr(how).encode())
    for path in _paths(asdict(case)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _paths(value: Any) -> Iterator[Path]:
    """The paths in the fields of a case."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths(part)
