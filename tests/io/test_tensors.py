"""Forms of checkpoints: where the state lies in them, what lies beside it, and what wrappers do to names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tcurlora_ext.io.tensors import match_names, not_finite, read_checkpoint, read_weights

STATE = {"blocks.0.weight": torch.arange(6.0).view(2, 3), "blocks.0.bias": torch.ones(2), "out.weight": torch.eye(2)}


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "model.", "net.", "network.", "backbone.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
        "model._orig_mod.net.", "_fsdp_wrapped_module.", "module._checkpoint_wrapped_module.",
    ],
)  # fmt: skip
def test_prefixes_are_undone_in_every_format(prefix: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(under(prefix), path)
    else:
        torch.save({"state_dict": under(prefix)} if suffix == ".ckpt" else under(prefix), path)
    assert same(match_names(read_weights(path), STATE))


def test_wrappers_inside_names_are_undone() -> None:
    names = {"_orig_mod.blocks._fsdp_wrapped_module.0._orig_mod.weight": "blocks.0.weight", "blocks.0.bias": None}
    found = match_names({name: STATE[own or name] for name, own in names.items()}, STATE)
    assert found.keys() == {"blocks.0.weight", "blocks.0.bias"}


def test_a_network_keeps_the_prefixes_that_are_its_own() -> None:
    """Llama with tied embeddings: all names in the file start with ``model.``, and so do the network's."""
    own = {f"model.{name}": value for name, value in STATE.items()}
    assert match_names(own, [*own, "lm_head.weight"]).keys() == own.keys()
    assert match_names(under("module.model."), own).keys() == own.keys()
    compiled = under("_orig_mod.")
    assert match_names(compiled, compiled).keys() == compiled.keys()


def test_what_lies_beside_a_prefixed_network_is_kept() -> None:
    """A loss with weights in a Lightning module: it stays, for the caller to refuse or to leave out."""
    found = match_names(under("model.") | {"loss.weight": torch.ones(2)}, STATE)
    assert found.keys() == {*STATE, "loss.weight"}


def test_names_that_would_collide_stay() -> None:
    tensors = under("module.") | {"out.weight": torch.zeros(2, 2)}
    assert match_names(tensors, STATE) == tensors


def bundle(state: Any) -> dict[str, Any]:
    return {
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
    } | state


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        bundle({"state_dict": STATE}),
        bundle({"model_state_dict": STATE}),
        bundle({"model": STATE}),
        bundle({"network_weights": STATE}),
        bundle({"model": {"state_dict": STATE}}),
        bundle({"anything": STATE, "best": torch.tensor(0.7)}),
    ],
    ids=["bare", "state_dict", "model_state_dict", "model", "network_weights", "nested twice", "the only one"],
)
def test_the_state_is_found_in_a_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    assert same(read_weights(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    "value",
    [np.float64(0.7), np.float32(0.7), np.int64(7), np.bool_(True), np.arange(3.0), np.array(["a", "b"])],
    ids=lambda value: f"{type(value).__name__} {value.dtype}",
)
def test_numpy_values_beside_tensors_are_read(value: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "best": value, "history": [value]}, tmp_path / "weights.pt")
    content = read_checkpoint(tmp_path / "weights.pt")
    assert np.array_equal(content["best"], value)
    assert type(content["history"][0]) is type(value)
    assert same(read_weights(tmp_path / "weights.pt"))


def test_numpy_values_of_the_other_major_version_are_read(tmp_path: Path) -> None:
    """NumPy 1 names the module ``numpy.core``, NumPy 2 ``numpy._core``."""
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": STATE, "best": np.float64(0.7)}, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    assert written.count(old) + written.count(new) == 1
    path.write_bytes(written.replace(new, old) if new in written else written.replace(old, new))
    assert read_checkpoint(path)["best"] == 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1)}, "holds a argparse.Namespace, which is not loaded"),
        ({"net": STATE, "ema": STATE}, "found tensors under net, ema, expected one of them alone"),
        ({"epoch": 3}, "holds no tensors (keys: epoch)"),
        ([torch.ones(1)], "holds a list, expected a dictionary of tensors"),
    ],
)
def test_other_content_is_named_in_one_line(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt") as raised:
        read_weights(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    for content in (b"", b"no checkpoint", b"PK\x03\x04 no archive"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as raised:
            read_weights(tmp_path / name)
        assert "\n" not in str(raised.value)
        assert "weights_only" not in str(raised.value)  # torch's advice to load it with its code
    (tmp_path / name).rename(tmp_path / "other.txt")
    with pytest.raises(FileNotFoundError, match="found a folder; expected pretrained weights"):
        read_weights(tmp_path)
    (tmp_path / "other.txt").rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"found a folder; expected the file in it, .*{name}"):
        read_weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_not_finite_names_the_tensors(dtype: torch.dtype) -> None:
    good = torch.ones(3).to(dtype)
    assert not_finite({"good": good}) == []
    if dtype.is_floating_point:
        assert not_finite({"good": good, "bad": torch.tensor([1.0, float("nan")]).to(dtype)}) == ["bad"]
