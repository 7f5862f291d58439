"""Segmentation networks by name, and pretrained weights in the forms that are found."""

from .building import (
    NETWORKS,
    NetworkConfig,
    NetworkSpec,
    build_network,
    check_network,
    complete_sizes,
    get_spec,
    has_prefix,
    load_weights,
    randomise,
    read_weights,
    save_weights,
    target_layers,
)

__all__ = [
    "NETWORKS",
    "NetworkConfig",
    "NetworkSpec",
    "build_network",
    "check_network",
    "complete_sizes",
    "get_spec",
    "has_prefix",
    "load_weights",
    "randomise",
    "read_weights",
    "save_weights",
    "target_layers",
]
