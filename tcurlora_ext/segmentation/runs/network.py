"""The network that a run adapts: read from weights, kept in the run folder, and read from there with an adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.networks.checkpoints import Base, Wanted, open_base
from tcurlora_ext.segmentation.dataset import SegmentationDataset
from tcurlora_ext.segmentation.methods import METHODS, base_name, folder_name, get_methods
from tcurlora_ext.segmentation.networks import (
    NetworkConfig,
    build_network,
    get_spec,
    load_weights,
    read_weights,
    save_weights,
)
from tcurlora_ext.segmentation.runs.folder import record
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings


def open_pretrained(settings: FinetuneSettings, path: Path, data: SegmentationDataset) -> Base:
    """The network with these weights, for the channels and classes of the data.

    Raises:
        ValueError, FileNotFoundError: Of :func:`~tcurlora_ext.segmentation.networks.checkpoints.open_base`; or the head alone is
            to train beside adapters where the decoder starts at random.
    """
    base = open_base(
        path,
        Wanted(data.channels, len(data.labels), settings.network, settings.sizes, settings.roi, settings.spacing),
    )
    if base.random and settings.also_train == "head":
        raise ValueError(f"also-train: found 'head', expected 'decoder': it starts at random, {base.file} has none")
    return base


def take_base(base: Base, out: Path) -> None:
    """Copy the pretrained network, and the transformer.json beside it, into the run folder."""
    digest = hashlib.sha256(base.file.read_bytes()).hexdigest()
    record(out, "base", {"sha256": digest, "head_is_new": base.head_is_new})
    if base.said:
        record(out, "weights", {"said": list(base.said), "random": list(base.random)})
    base.config.save(out / "network.json")
    save_weights(base.model, out / "base.safetensors")
    check = base.file.parent / "transformer.json"
    if check.is_file():
        write_json(out / "transformer.json", read_json(check))


def load_base(run_dir: Path) -> nn.Module:
    """The pretrained network of a run of `finetune` or `pretrain`, not adapted, in eval mode and on the CPU."""
    config = NetworkConfig.read(run_dir / "network.json")
    model = build_network(config)
    path = run_dir / "base.safetensors"
    load_weights(model, read_weights(path), get_spec(config.network), path)
    return model.eval()


def load_adapted(run_dir: Path, method: str, seed: int = 0) -> nn.Module:
    """The network of a run with the adapter of a method and seed, in eval mode and on the CPU.

    Raises:
        FileNotFoundError: The run has no adapter of this method and seed.
    """
    config = NetworkConfig.read(run_dir / "network.json")
    chosen = METHODS.get(base_name(method)) or get_methods([method])[0]  # which raises for an unknown name
    model = load_base(run_dir)
    path = run_dir / folder_name(method) / f"seed{seed}" / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the adapter of a finished run of '{method}'")
    chosen.load(model, path, get_spec(config.network), chosen.prepare)
    return model.eval()
