"""The network that a run adapts: read from weights, kept in the run folder, and read from there with an adapter."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from torch import nn

from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.dataset import SegmentationDataset, read_dataset
from tcurlora_ext.segmentation.methods import METHODS, base_name, folder_name, get_methods
from tcurlora_ext.segmentation.networks import (
    NetworkConfig,
    build_network,
    check_network,
    get_spec,
    load_weights,
    read_weights,
    save_weights,
)
from tcurlora_ext.segmentation.runfolder import record
from tcurlora_ext.segmentation.settings import FinetuneSettings


def read_data(settings: FinetuneSettings, folder: Path) -> SegmentationDataset:
    """The data set in a folder, by the options of the settings."""
    return read_dataset(
        folder, train_list=settings.train_list, val_list=settings.val_list, val_fraction=settings.val_fraction,
        seed=settings.data_seed, labels=settings.labels,
    )  # fmt: skip


def load_pretrained(
    settings: FinetuneSettings, path: Path, data: SegmentationDataset
) -> tuple[NetworkConfig, nn.Module, bool]:
    """The network's configuration, the model with these weights, and whether its head is new."""
    if settings.network is None and (path.parent / "network.json").is_file():
        config = NetworkConfig.read(path.parent / "network.json")
    elif settings.network is not None:
        config = NetworkConfig(settings.network, 1, 2, settings.roi or (96, 96, 96), None, settings.sizes)
    else:
        tensors = read_weights(path)  # raises for a missing or damaged file first
        raise ValueError(f"{path}: {len(tensors)} tensors but no network.json beside them; expected it or --network")
    config = replace(
        config, in_channels=data.channels, out_channels=len(data.labels), roi=settings.roi or config.roi,
        spacing=settings.spacing or config.spacing, sizes=check_network(config),
    )  # fmt: skip
    model = build_network(config)
    return config, model, load_weights(model, read_weights(path), get_spec(config.network), path)


def take_base(
    settings: FinetuneSettings, pretrained: Path, data: SegmentationDataset, out: Path
) -> tuple[NetworkConfig, bool]:  # fmt: skip
    """Copy the pretrained network, and the transformer.json beside it, into the run folder."""
    config, model, head_is_new = load_pretrained(settings, pretrained, data)
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    record(out, "base", {"sha256": digest, "head_is_new": head_is_new})
    config.save(out / "network.json")
    save_weights(model, out / "base.safetensors")
    check = pretrained.parent / "transformer.json"
    if check.is_file():
        write_json(out / "transformer.json", read_json(check))
    return config, head_is_new


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
