"""Errors of the system while a file is written, and what killed processes leave: nothing is lost, nothing stays."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.io.atomic import replacing, write_bytes, write_together, write_with
from tcurlora_ext.io.records import write_csv, write_json
from tcurlora_ext.io.tensors import write_checkpoint

LARGE = {"weight": torch.zeros(20_000)}


def save_adapter(path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    tcur.save_adapter(tcur.inject(model, tcur.TCURConfig(rank=64, target_modules=["0", "1"])), path)


def write_volume(path: Path) -> None:
    nib = pytest.importorskip("nibabel")
    write_with(path, partial(nib.save, nib.Nifti1Image(np.zeros((20, 20, 200), np.float32), np.eye(4))))


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: write_bytes(path, bytes(80_000)),
    "json": lambda path: write_json(path, list(range(20_000))),
    "csv": lambda path: write_csv(path, [{"step": step} for step in range(20_000)]),
    "checkpoint": lambda path: write_checkpoint(path, LARGE),
    "volume": write_volume,
    "adapter": save_adapter,
}


@contextmanager
def full_disk(limit: int = 10_000) -> Iterator[None]:
    """No file of this process grows beyond `limit` bytes: a write beyond it fails in the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """A read-only folder, for a user whom that binds: root gives up its rights meanwhile."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_earlier_one(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "result.nii"
    path.write_bytes(b"earlier")
    with (
        full_disk(),
        pytest.raises(Exception, match="the file is not written, and an earlier one is as it was") as info,
    ):
        WRITERS[writer](path)
    assert isinstance(info.value, OSError)
    assert str(path) in str(info.value)
    assert "partial" not in str(info.value)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_without_permission_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("earlier")
    with no_permission(tmp_path), pytest.raises(PermissionError, match="Permission denied") as info:
        write_json(path, {})
    assert info.value.filename == str(path)
    assert path.read_text() == "earlier"


def test_files_that_are_written_together_are_complete_before_one_is_renamed(tmp_path: Path) -> None:
    write_together(tmp_path / "new", {"a": b"1", "b": b"2"})
    (tmp_path / "new" / "mine").write_text("kept")
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert before == {"a": b"1", "b": b"2", "mine": b"kept"}
    for large, folder in ((large, folder) for large in "ab" for folder in ("new", "none")):
        contents = {"a": b"3", "b": b"4"} | {large: bytes(80_000)}
        message = "the file is not written, and an earlier one is as it was"
        with full_disk(), pytest.raises(OSError, match=message) as info:
            write_together(tmp_path / folder, contents)
        assert info.value.filename == str(tmp_path / folder / large)
        assert str(info.value).count(message) == 1
        assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before
        assert not (tmp_path / "none").exists()


def a_file_in_place_of_the_folder(root: Path) -> Path:
    (root / "run").write_text("a file")
    return root / "run" / "result.json"


def a_folder_in_place_of_the_file(root: Path) -> Path:
    (root / "result.json").mkdir()
    return root / "result.json"


@pytest.mark.parametrize("make", [a_file_in_place_of_the_folder, a_folder_in_place_of_the_file])
def test_what_is_in_the_way_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="the file is not written") as info:
        write_json(path, {})
    assert info.value.filename == str(path)
    assert "partial" not in str(info.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_of_a_writer_that_is_none_of_the_system_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="own"), replacing(tmp_path / "a"):
        raise RuntimeError("own")
    with (
        pytest.raises(OSError, match=r"a\.png: unknown format; the file is not written") as info,
        replacing(tmp_path / "a.png"),
    ):
        raise OSError("unknown format")  # as image libraries raise it, without the system's number
    assert info.value.errno is None


WAITING = """
    import sys, time
    from pathlib import Path
    sys.modules["torch"] = None  # the module under test needs no other
    import importlib.util
    spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
    atomic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(atomic)
    with atomic.replacing(Path(sys.argv[2])) as temporary:
        temporary.write_text("theirs")
        print("written", flush=True)
        sys.stdin.readline()
"""


@contextmanager
def another_writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the midst of writing `path`; it ends when it reads a line."""
    module = sys.modules[replacing.__module__].__file__
    command = [sys.executable, "-c", textwrap.dedent(WAITING), str(module), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_left_goes_at_the_next_save_of_the_same_file(tmp_path: Path) -> None:
    path, other = tmp_path / "adapter.safetensors", tmp_path / "adapter.pt"
    for target in (path, other):
        with another_writer(target) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_bytes(path, b"mine")
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".adapter.")
    assert left.suffix == ".pt"
    write_bytes(other, b"mine")
    assert set(tmp_path.iterdir()) == {path, other}


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with another_writer(path) as process:
        write_bytes(path, b"mine")
        assert path.read_bytes() == b"mine"
        process.communicate("\n")
        assert process.returncode == 0
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
