"""Adapter files: what they contain, that they are never written in part, and which are refused."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import tcurlora_ext as tcur
from tcurlora_ext.adapter.files.format import read_adapter


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header, its digest left out, and the tensors of a file, by safetensors alone."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tcurlora"])
        assert len(header.pop("digest")) == 64
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path: Path, header: Any, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path, {"tcurlora": header if isinstance(header, str) else json.dumps(header)})
    return path


def test_the_file_holds_cores_indices_and_a_json_header(adapted: Any, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted, tmp_path / "one.safetensors")
    assert path == tmp_path / "one.safetensors"
    header, tensors = parts_of(path)
    assert set(tensors) == {f"{kind}.{name}" for kind in ("core", "rows", "columns") for name in tcur.stacks(adapted)}
    assert set(header) == {"format", "config", "stacks"}
    assert header["config"]["rank"] == 2
    for name, stack in tcur.stacks(adapted).items():
        assert torch.equal(tensors[f"core.{name}"], stack.core)
        assert tensors[f"rows.{name}"].dtype == torch.int64
        assert header["stacks"][name]["names"] == stack.names
        assert header["stacks"][name]["scale"] == stack.scale
        assert len(header["stacks"][name]["fingerprint"]) == stack.slices


def test_factors_are_in_the_file_where_asked_for_or_trained(make_network: Any, tmp_path: Path) -> None:
    for config, asked in ((tcur.TCURConfig(rank=2), True), (tcur.TCURConfig(rank=2, trainable="all"), False)):
        model = tcur.inject(make_network(), config)
        _, tensors = parts_of(tcur.save_adapter(model, tmp_path / "f.safetensors", include_factors=asked))
        for name, stack in tcur.stacks(model).items():
            assert torch.equal(tensors[f"col.{name}"], stack.col)
            assert torch.equal(tensors[f"row.{name}"], stack.row)


def test_what_trains_beside_travels_with_its_buffers(adapted: Any, tmp_path: Path) -> None:
    tcur.unfreeze(adapted, ["head", "norm"])
    _, tensors = parts_of(tcur.save_adapter(adapted, tmp_path / "f.safetensors"))
    beside = {name for name in tensors if name.split(".")[0] in ("trained", "state")}
    assert beside == {
        "trained.head.weight", "trained.head.bias", "trained.norm.weight", "trained.norm.bias",
        "state.norm.running_mean", "state.norm.running_var", "state.norm.num_batches_tracked",
    }  # fmt: skip
    assert torch.equal(tensors["trained.head.weight"], adapted.head.weight)


def test_a_folder_gets_adapter_safetensors_and_missing_folders_are_made(adapted: Any, tmp_path: Path) -> None:
    assert tcur.save_adapter(adapted, tmp_path) == tmp_path / "adapter.safetensors"
    assert read_adapter(tmp_path).path == tmp_path / "adapter.safetensors"
    assert tcur.save_adapter(adapted, tmp_path / "a" / "b" / "c.safetensors").exists()


def test_a_merged_model_saves_the_same_file(adapted: Any, tmp_path: Path) -> None:
    first = tcur.save_adapter(adapted, tmp_path / "a").read_bytes()
    assert tcur.save_adapter(tcur.merge(adapted), tmp_path / "b").read_bytes() == first


def test_a_plain_model_has_nothing_to_save(network: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not adapted"):
        tcur.save_adapter(network, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.write_bytes"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_and_no_rubbish(
    adapted: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    path = tcur.save_adapter(adapted, tmp_path / "f.safetensors")
    before = path.read_bytes()
    train(adapted)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)):
            tcur.save_adapter(adapted, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    tcur.save_adapter(adapted, path)
    assert path.read_bytes() != before


def test_the_path_never_holds_a_part(adapted: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed just before the rename leaves the old file, complete."""
    path = tcur.save_adapter(adapted, tmp_path / "f.safetensors")
    before, seen = path.read_bytes(), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(path.read_bytes()), real(handle))[1])
    train(adapted)
    tcur.save_adapter(adapted, path)
    assert seen[0] == before  # the file's own; the folder is flushed after the rename


def test_the_file_has_ordinary_permissions(adapted: Any, tmp_path: Path) -> None:
    path = tcur.save_adapter(adapted, tmp_path / "f")
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.fixture
def saved(adapted: Any, tmp_path: Path) -> Path:
    return tcur.save_adapter(adapted, tmp_path / "saved.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such adapter file"):
            read_adapter(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    length = int(keep * len(content)) if 0 < keep < 1 else int(keep)
    saved.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"saved\.safetensors: found no whole safetensors file, expected an adapter"):
        read_adapter(saved)


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    sign, path = tmp_path / "sign", tmp_path / "adapter.safetensors"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Trap(sign)))
    else:
        torch.save({"core": Trap(sign)}, path)
    with pytest.raises(ValueError, match="found no whole safetensors file"):
        read_adapter(path)
    assert not sign.exists()


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_A": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"lora\.safetensors: found a safetensors file without a 'tcurlora' header"):
        read_adapter(path)


@pytest.mark.parametrize(
    "header", ["", "{", "null", "[]", "{}", '"text"', '{"format": 1}', '{"format": 1, "config": 3}']
)
def test_a_header_that_is_no_description_is_refused(saved: Path, header: str) -> None:
    _, tensors = parts_of(saved)
    with pytest.raises(ValueError, match=r"saved\.safetensors: .*damaged"):
        read_adapter(write(saved, header, tensors))


def test_another_format_is_named(saved: Path) -> None:
    header, tensors = parts_of(saved)
    with pytest.raises(ValueError, match="found adapter format 3, expected one of 1, 2"):
        read_adapter(write(saved, header | {"format": 3}, tensors))


ENTRIES = ["names", "scale", "normalised", "row_scores", "column_scores", "base_dtype", "fingerprint"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_missing_entry_is_refused(saved: Path, entry: str) -> None:
    header, tensors = parts_of(saved)
    del header["stacks"]["16x8"][entry]
    with pytest.raises(ValueError, match=rf"saved\.safetensors: .*damaged.*{entry}"):
        read_adapter(write(saved, header, tensors))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("scale", "large"), ("scale", None), ("scale", float("nan")), ("fingerprint", "none"), ("fingerprint", [[1.0]]),
        ("names", 3), ("names", ["one"]), ("names", ["blocks.0.mlp.linear1", 1]), ("scale", 10**400),
        ("base_dtype", "float7"), ("base_dtype", None), ("row_scores", "high"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_refused(saved: Path, entry: str, value: Any) -> None:
    header, tensors = parts_of(saved)
    header["stacks"]["16x8"][entry] = value
    with pytest.raises(ValueError, match=r"saved\.safetensors: .*damaged"):
        read_adapter(write(saved, header, tensors))


@pytest.mark.parametrize("kind", ["core", "rows", "columns"])
def test_a_missing_tensor_is_refused(saved: Path, kind: str) -> None:
    header, tensors = parts_of(saved)
    del tensors[f"{kind}.16x8"]
    with pytest.raises(ValueError, match=rf"saved\.safetensors: .*damaged.*{kind}\.16x8"):
        read_adapter(write(saved, header, tensors))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("core.16x8", torch.zeros(3, 2, 2)), ("core.16x8", torch.full((2, 2, 2), float("nan"))),
        ("core.16x8", torch.full((2, 2, 2), float("nan")).to(torch.float8_e4m3fn)),
        ("core.16x8", torch.zeros(2, 2, 2).long()),
        ("rows.16x8", torch.tensor([0, -1])), ("rows.16x8", torch.tensor([0.0, 1.0])),
        ("columns.16x8", torch.tensor([[0, 1]])),
    ],
)  # fmt: skip
def test_a_damaged_tensor_is_refused(saved: Path, name: str, value: torch.Tensor) -> None:
    header, tensors = parts_of(saved)
    with pytest.raises(ValueError, match=rf"saved\.safetensors: .*damaged.*{name.split('.')[1]}"):
        read_adapter(write(saved, header, tensors | {name: value}))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": -1}, {"transform": "fft"}, {"dropout": 1.5}, {"drop_path": 0.1}, {"backend": "cuto"},
        {"backend": None}, {"alpha": None}, {"rank_pattern": 3}, {"split_fused": None},
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(saved: Path, change: dict[str, Any]) -> None:
    header, tensors = parts_of(saved)
    header["config"] |= change
    with pytest.raises(ValueError, match=r"saved\.safetensors: .*damaged"):
        read_adapter(write(saved, header, tensors))


def test_a_changed_value_is_found_by_the_digest(make_network: Any, tmp_path: Path) -> None:
    path = tcur.save_adapter(tcur.inject(make_network(), tcur.TCURConfig(rank=2)), tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors: the file is damaged: its content has another digest"):
        tcur.load_adapter(make_network(), path)
