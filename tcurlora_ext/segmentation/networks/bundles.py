"""MONAI bundles as pretrained weights: the network that their configuration defines, and the file of its weights.

Nothing of a bundle is run: references in `network_def` are resolved by MONAI's ConfigParser, expressions are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.networks.building import NETWORKS
from tcurlora_ext.segmentation.packages import require_package

CONFIGS = tuple(f"{name}.{suffix}" for name in ("inference", "train") for suffix in ("json", "yaml", "yml"))
KEYS = ("network_def", "network")
TARGETS = {"UNETR": "unetr", "SwinUNETR": "swinunetr", "SegResNet": "segresnet"}
_MODULE = "monai.networks.nets"
# Arguments that change neither the network's function nor its weights, and those of which one value alone is built.
_FREE = {
    "use_checkpoint", "save_attn", "proj_type", "pos_embed", "drop_rate", "attn_drop_rate", "dropout_path_rate",
    "use_flash_attention",
}  # fmt: skip
_FIXED: dict[str, Any] = {
    "spatial_dims": 3, "norm_name": "instance", "window_size": 7, "patch_size": 2, "mlp_ratio": 4.0, "normalize": True,
    "patch_norm": False, "downsample": "merging",
}  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """What a bundle says about its network.

    Attributes:
        weights: The file.
        network: The architecture's name.
        sizes: Sizes that its arguments set.
        roi: The window in voxels; None where the configuration has none.
        title: Name and version, and where the network was found.
    """

    weights: Path
    network: str
    sizes: dict[str, Any]
    roi: tuple[int, int, int] | None
    title: str


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle."""
    return (path / "configs").is_dir()


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's configuration.

    Raises:
        FileNotFoundError: A file of the bundle is missing.
        ValueError: Its network is not one that can be built, or an argument is an expression or has another value.
    """
    require_package("monai")
    configs, meta = folder / "configs", folder / "configs" / "metadata.json"
    if not meta.is_file():
        raise FileNotFoundError(f"{meta}: no such file; expected the configuration of a MONAI bundle")
    path = next((configs / name for name in CONFIGS if (configs / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{configs}: found none of {', '.join(CONFIGS)}, expected one with network_def")
    weights = folder / "models" / "model.pt"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; expected the bundle's weights")
    network, arguments, window = _definition(path)
    roi, sizes = arguments.pop("img_size", None) or window, {}
    for name, value in arguments.items():
        if name in NETWORKS[network].sizes:
            sizes[name] = value
        elif name in _FIXED and value not in (_FIXED[name], [_FIXED[name]] * 3):
            raise ValueError(f"{path}: found {name} = {value} of the network, expected {_FIXED[name]}")
        elif name not in (*_FREE, *_FIXED, "in_channels", "out_channels", "qkv_bias"):
            raise ValueError(f"{path}: found the argument {name} of the network, which is not read; expected others")
    described = read_json(meta)
    name = f"{described.get('name', folder.name)} {described.get('version', '')}".strip()
    return Bundle(weights, network, sizes, _triple(path, roi), f"MONAI bundle {name}: {network} as in {path.name}")


def _definition(path: Path) -> tuple[str, dict[str, Any], Any]:
    """The name of the network, its arguments, and the window of the inferer where that is given as numbers."""
    from monai.bundle.config_item import ConfigItem
    from monai.bundle.config_parser import ConfigParser

    try:
        content = ConfigParser.load_config_file(path)
    except Exception as error:  # of JSON and YAML, without a common base
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}), expected a config") from error
    key = next((key for key in KEYS if isinstance(content.get(key), dict)), None)
    if key is None:
        raise ValueError(f"{path}: found no {' or '.join(KEYS)} with arguments, expected the definition of a network")
    target = str(content[key].get("_target_"))
    name = target.rpartition(".")[2]
    if name not in TARGETS or not (target == name or target.startswith(f"{_MODULE}.")):
        raise ValueError(f"{path}: found the network '{target}', expected one of {', '.join(TARGETS)} of {_MODULE}")
    try:
        item = ConfigParser(content).get_parsed_content(key, instantiate=False, eval_expr=False)
        arguments: dict[str, Any] = dict(item.resolve_args())
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {key} cannot be resolved ({' '.join(str(error).split())[:200]})") from error
    for argument, value in arguments.items():
        if isinstance(value, ConfigItem) or (isinstance(value, str) and value.startswith("$")):
            raise ValueError(f"{path}: {argument} of {key} is an expression, which is not run; expected a value")
    inferer = content.get("inferer")
    return TARGETS[name], arguments, inferer.get("roi_size") if isinstance(inferer, dict) else None


def _triple(path: Path, window: Any) -> tuple[int, int, int] | None:
    """One number or three as a window; None for other forms, such as a reference."""
    sides = [window] * 3 if isinstance(window, int) else window
    if not isinstance(sides, (list, tuple)) or len(sides) != 3 or not all(isinstance(side, int) for side in sides):
        return None
    return (sides[0], sides[1], sides[2])
