"""Building the model that a command's arguments name: a preset, a transformers configuration, or the user's function.

Models are built on the meta device, which takes no memory and draws no random weights. Where a command needs weights,
they are read from safetensors files.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.tensors import match_names, not_finite, read_weights
from tcurlora_ext.segmentation.networks import NETWORKS, NetworkConfig, build_network, check_network

# Channels, classes and window of a preset where --kwargs has no others.
PRESETS: dict[str, dict[str, Any]] = {
    "unetr": {"in_channels": 1, "out_channels": 2, "roi": (96, 96, 96)},
    "swinunetr": {"in_channels": 1, "out_channels": 2, "roi": (96, 96, 96)},
    "vit": {"in_channels": 1, "out_channels": 2, "roi": (32, 32, 32)},
    "dynunet": {"in_channels": 1, "out_channels": 2, "roi": (96, 96, 96)},
    "segresnet": {"in_channels": 1, "out_channels": 2, "roi": (96, 96, 96)},
}
EXPECTED = f"{', '.join(PRESETS)}, a folder or file with a transformers config.json, or package.module:callable"


def build_model(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model of this name, on the meta device.

    Args:
        name: A preset's name, the path of a transformers config.json or of its folder, or "package.module:callable".
        kwargs: Sizes of the preset, values in the configuration, or arguments of the callable.

    Raises:
        ValueError, OSError: There is no such model; the message says what was expected.
    """
    if name in PRESETS:
        config = _preset(name, kwargs)
        check_network(config)
        return _constructed(name, kwargs, lambda: build_network(config))
    if Path(name).exists():
        return _transformers_model(Path(name), kwargs)
    if ":" in name:
        function = _function(name, kwargs)
        model = _constructed(name, kwargs, lambda: function(**kwargs))
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: {name} returned a {type(model).__name__}, expected a torch.nn.Module")
        return model
    if "/" in name or name.endswith(".json"):
        raise FileNotFoundError(f"{name}: no such file or folder; expected {EXPECTED}")
    raise ValueError(f"model: found '{name}', expected {EXPECTED}")


def preset_input(name: str, kwargs: Mapping[str, Any], batch: int) -> torch.Tensor | None:
    """An input (batch, channels, X, Y, Z) of a preset, on the meta device; None for any other model."""
    if name not in PRESETS:
        return None
    config = _preset(name, kwargs)
    return torch.empty(batch, config.in_channels, *config.roi, device="meta")


def load_model(name: str, kwargs: Mapping[str, Any], weights: Path) -> nn.Module:
    """The model with the weights of a safetensors file or of all such files in a folder, on the CPU, in their dtype.

    Every parameter needs a tensor and every tensor a parameter. Of weights that are tied in the model, one is enough.
    A preset has the sizes of `network.json` beside the weights, where that is of the same network; `kwargs` go over
    them.

    Raises:
        ValueError, OSError: Of :func:`build_model`; or the weights do not fit, with the names that differ; or a
            parameter is NaN or infinite.
    """
    model = build_model(name, {**_beside(name, weights), **kwargs})
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(weights):
        tensors |= read_weights(file)
    expected = model.state_dict()
    tensors = match_names(tensors, expected)
    wrong = [f"{key} is not in the model" for key in tensors if key not in expected]
    wrong += [
        f"{key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if not wrong:
        model.load_state_dict(tensors, strict=False, assign=True)
        tie = getattr(model, "tie_weights", None)
        if callable(tie):
            tie()
        wrong = [f"{key} is missing" for key, value in model.state_dict().items() if value.is_meta]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{weights}: weights do not fit {name}: {'; '.join(wrong[:4])}{more}")
    # parameters alone: an attention mask among the buffers is infinite by design
    if broken := not_finite(dict(model.named_parameters())):
        raise ValueError(f"{weights}: found NaN or infinite values in {', '.join(broken[:4])}, expected finite weights")
    return model.eval()


def _beside(name: str, weights: Path) -> dict[str, Any]:
    """The sizes of a preset that `network.json` beside its weights has; none without one of the same network."""
    file = (weights if weights.is_dir() else weights.parent) / "network.json"
    if name not in PRESETS or not file.is_file():
        return {}
    config = NetworkConfig.read(file)
    if config.network != name:
        return {}
    return {
        **config.sizes, "in_channels": config.in_channels, "out_channels": config.out_channels, "roi": config.roi
    }  # fmt: skip


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: found no *.safetensors in this folder, expected the base weights")
    return files


def _constructed(name: str, kwargs: Mapping[str, Any], build: Any) -> Any:
    """What `build` makes on the meta device; ValueError, which names the model, where its constructor fails."""
    try:
        return _on_meta(build)
    except (ModuleNotFoundError, OSError):
        raise  # a package or a file is missing, which the message says
    except Exception as error:  # constructors have no common base for what they refuse
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        given = f" with {dict(kwargs)}" if kwargs else ""
        raise ValueError(f"{name}: the model cannot be built{given} ({reason})") from error


def _on_meta(build: Any) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    # Some constructors read values of a tensor (SwinUNETR its drop path rates), which a meta tensor does not have.
    model = build()
    return model.to("meta") if isinstance(model, nn.Module) else model


def _preset(name: str, kwargs: Mapping[str, Any]) -> NetworkConfig:
    values = PRESETS[name] | {key: kwargs[key] for key in kwargs if key in PRESETS[name]}
    sizes = {key: value for key, value in kwargs.items() if key not in PRESETS[name]}
    unknown = sorted(set(sizes) - set(NETWORKS[name].sizes))
    if unknown:
        known = ", ".join([*PRESETS[name], *NETWORKS[name].sizes])
        raise ValueError(f"kwargs of {name}: found {', '.join(unknown)}, expected among {known}")
    roi = values["roi"]
    roi = (roi,) * 3 if isinstance(roi, int) else tuple(roi)
    if len(roi) != 3 or not all(isinstance(length, int) for length in roi):
        raise ValueError(f"kwargs of {name}: found roi {values['roi']}, expected a whole number or three")
    return NetworkConfig(name, values["in_channels"], values["out_channels"], roi, None, sizes)


def _transformers_model(path: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a transformers config.json in the folder")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package 'transformers' is not installed; expected it for a model from config.json: "
            "pip install 'tcurlora_ext[test]' or pip install transformers", name="transformers",
        ) from error  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file}: found no transformers configuration that can be read ({reason})") from error
    unknown = sorted(key for key in kwargs if not hasattr(config, key))
    if unknown:
        raise ValueError(f"kwargs: {type(config).__name__} has no {', '.join(unknown)}")
    for key, value in kwargs.items():
        setattr(config, key, value)
    architectures = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, architectures[0], None)
    build = transformers.AutoModel.from_config if kind is None else kind._from_config
    return _constructed(str(file), kwargs, lambda: build(config))


def _function(name: str, kwargs: Mapping[str, Any]) -> Any:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the script `tcurlora` then finds the same modules
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"model: found no module '{error.name}' for '{name}', expected {EXPECTED}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"model: {module_name} has no function or class '{attribute}'")
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"kwargs: {name} does not take {dict(kwargs)}: {error}") from None
    return function
