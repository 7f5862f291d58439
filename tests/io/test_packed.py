"""Packed files: what was packed comes back bit for bit, damage is named, and other files stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tcurlora_ext.io.packed import PACKED, SMALL, pack
from tcurlora_ext.io.tensors import read_tensors

KEY, TEXT = "tcurlora", '{"names": ["layer"], "value": 0.1}'
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def tensors_of(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {str(dtype): (100 * torch.randn(3, 5, generator=draw)).to(dtype) for dtype in DTYPES}
    return {**found, "empty": torch.empty(2, 0), "number": torch.tensor(1.5), "large": torch.randn(SMALL // 4)}


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


def test_tensors_and_text_come_back_bit_for_bit(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", tensors_of()
    path.write_bytes(pack(tensors, KEY, TEXT))
    metadata, found = read_tensors(path, "a file")
    assert metadata == {KEY: TEXT}
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in tensors.items()}
    assert set(safetensors.torch.load_file(path)) == {"large", PACKED}, "large tensors keep their names in the file"


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_any_shapes_and_dtypes(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    tensors = {f"t{at}": torch.ones(shape).to(dtype) for at, (dtype, shape) in enumerate(entries)}
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    path.write_bytes(pack(tensors, KEY, TEXT))
    metadata, found = read_tensors(path, "a file")
    assert (metadata, {n: bits(t) for n, t in found.items()}) == ({KEY: TEXT}, {n: bits(t) for n, t in tensors.items()})


def test_many_small_tensors_take_less_room_than_apart() -> None:
    tensors = {f"directions.left.blocks_{at}_linear": torch.randn(16) for at in range(100)}
    apart = safetensors.torch.save(tensors, {KEY: TEXT})
    assert len(pack(tensors, KEY, TEXT)) < 0.6 * len(apart)


def test_a_tensor_that_is_called_so_does_not_make_a_packed_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({PACKED: torch.ones(3)}, tmp_path / "a.safetensors", {KEY: TEXT})
    metadata, found = read_tensors(tmp_path / "a.safetensors", "a file")
    assert metadata == {KEY: TEXT}
    assert torch.equal(found[PACKED], torch.ones(3))


@pytest.mark.parametrize("kind", ["cut", "flipped", "longer", "text"])
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(tensors_of(), KEY, TEXT))
    with safetensors.safe_open(path, "pt") as file:
        metadata, content = file.metadata(), file.get_tensor(PACKED)
    changed = {
        "cut": content[:-3], "flipped": content.clone(), "longer": torch.cat([content, content[:4]]),
        "text": torch.tensor(list(b"no zlib"), dtype=torch.uint8),
    }[kind]  # fmt: skip
    if kind == "flipped":
        changed[len(changed) // 2] ^= 255
    safetensors.torch.save_file({PACKED: changed}, path, metadata)
    with pytest.raises(ValueError, match=r"a\.safetensors: the file is damaged where it is packed, expected a file"):
        read_tensors(path, "a file")
