"""Pretrained weights to adapt: which network they are of, and a model with them.

The network is that of `network.json` beside the file, of a MONAI bundle, of the user's options, or it is told from the
tensors. Of an encoder alone, everything after it starts at random. What was taken and what was not is said in words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tcurlora_ext.io.records import read_json
from tcurlora_ext.io.tensors import read_weights, unwrapped
from tcurlora_ext.segmentation.networks.building import (
    NetworkConfig,
    NetworkSpec,
    build_network,
    check_network,
    complete_sizes,
    get_spec,
    has_prefix,
    load_weights,
)
from tcurlora_ext.segmentation.networks.bundles import Bundle, is_bundle, read_bundle
from tcurlora_ext.segmentation.networks.forms import (
    UNUSED,
    Form,
    find_form,
    infer_heads,
    infer_sizes,
    infer_window,
    plain_tensors,
)

NEAR_ZERO = 0.05  # Dice before adaptation, below which a base is not for these data, or its labels are others
UNETR_BLOCKS = 12
PLACES = "vit.patch_embedding.position_embeddings"
_WINDOW = (96, 96, 96)


@dataclass(frozen=True)
class Base:
    """A network with pretrained weights.

    Attributes:
        file: The weights.
        config: Of the network.
        model: The network.
        head_is_new: Whether its head starts at random.
        random: Parts of the network that start at random beside the head, by the prefixes of their parameters.
        said: What was taken from the file and how, where that does not go without saying.
    """

    file: Path
    config: NetworkConfig
    model: nn.Module
    head_is_new: bool
    random: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is to be built; None leaves it to the weights.

    Attributes:
        channels: Of an image.
        classes: With the background.
        network: The architecture's name.
        sizes: Of it.
        roi: The window in voxels.
        spacing: Voxel size in mm.
    """

    channels: int
    classes: int
    network: str | None
    sizes: Mapping[str, Any]
    roi: tuple[int, int, int] | None
    spacing: tuple[float, float, float] | None


@dataclass(frozen=True)
class _Source:
    """A file's tensors and what they are of.

    Attributes:
        file: The weights.
        tensors: Under the network's names, where its form is known.
        config: Of the network, before the data's channels and classes.
        form: Of the file; None where `network.json` says all.
        outside: Names of tensors outside an encoder.
        said: As in `Base`.
    """

    file: Path
    tensors: dict[str, Tensor]
    config: NetworkConfig
    form: Form | None
    outside: list[str]
    said: list[str]


def open_base(path: Path, wanted: Wanted) -> Base:
    """A network with the weights of a file or of a MONAI bundle.

    Raises:
        FileNotFoundError: There is no such file or bundle.
        ValueError: The file cannot be read, the network cannot be told, sizes are given that `network.json` has
            otherwise, or the weights do not fit the network.
    """
    source = _identify(path, wanted)
    config, form = source.config, source.form
    config = replace(
        config, in_channels=wanted.channels, out_channels=wanted.classes, roi=wanted.roi or config.roi,
        spacing=wanted.spacing or config.spacing, sizes=check_network(config),
    )  # fmt: skip
    spec, model = get_spec(config.network), build_network(config)
    state, tensors = model.state_dict(), source.tensors
    if form is not None:
        tensors = {name: state[name] for name in state if UNUSED in name} | tensors
    tensors, changed = with_channels(tensors, spec, state)
    random: tuple[str, ...] = ()
    if form is not None and not form.whole:
        outside = [*source.outside, *(name.removeprefix(form.encoder) for name in tensors if name not in state)]
        tensors = {name: tensor for name, tensor in tensors.items() if name in state}
        others = {name: state[name] for name in state if not has_prefix(name, (form.encoder,))}
        random = tuple(dict.fromkeys(name.partition(".")[0] for name in others))
        changed += _of_encoder(tensors, outside, random, spec)
        tensors = others | tensors
    try:
        head_is_new = load_weights(model, tensors, spec, source.file) or bool(random)
    except ValueError as error:
        raise ValueError(f"{error}{_other_window(source, config, state)}") from None
    return Base(source.file, config, model, head_is_new, random, (*source.said, *changed))


def _identify(path: Path, wanted: Wanted) -> _Source:
    """Read the tensors of a file or bundle, and find out which network they are of."""
    bundle = read_bundle(path) if is_bundle(path) else None
    file = path if bundle is None else bundle.weights
    tensors = read_weights(file)
    beside = file.parent / "network.json"
    if wanted.network is None and bundle is None and beside.is_file():
        config = NetworkConfig.read(beside)
        _check_sizes(beside, config, wanted.sizes)
        return _Source(file, tensors, config, None, [], [])
    if bundle is not None and wanted.network not in (bundle.network, None):
        raise ValueError(f"network: found '{wanted.network}', expected {bundle.network} as {path} has it")
    bare = {unwrapped(name): tensor for name, tensor in tensors.items()}
    tensors = bare if len(bare) == len(tensors) else tensors
    form = find_form(tensors)
    name = wanted.network or (form.network if form else None) or (bundle.network if bundle else None)
    spec = get_spec(name or _told(file, form, tensors))
    if form is not None and (form.network not in (spec.name, None) or not spec.blocks.startswith(form.encoder)):
        form = None  # of another network, whose names the error will show
    tensors, outside, converted = _plain(file, tensors, form, spec, wanted)
    config, told = _config(file, form, tensors, spec, wanted, bundle)
    return _Source(
        file, tensors, config, form, outside, [*([bundle.title] if bundle else []), *converted, *told]
    )  # fmt: skip


def _other_window(source: _Source, config: NetworkConfig, state: Mapping[str, Tensor]) -> str:
    """The end of an error on weights where position embeddings are those of another window, which it names."""
    found, expected = source.tensors.get(PLACES), state.get(PLACES)
    if found is None or expected is None or found.shape == expected.shape:
        return ""
    window = source.config.roi if source.form is None else infer_window(source.tensors)
    if window is None or window == config.roi:
        return ""
    own, wanted = ("x".join(map(str, roi)) for roi in (window, config.roi))
    return f"; roi: found {wanted}, expected {own}, with which the base was trained"


def _check_sizes(file: Path, config: NetworkConfig, given: Mapping[str, Any]) -> None:
    """Raise ValueError where sizes are given that `network.json` has otherwise."""
    own, wanted = (complete_sizes(get_spec(config.network), sizes) for sizes in (config.sizes, given))
    other = [name for name in given if json.dumps(wanted[name]) != json.dumps(own[name])]  # a tuple is as its list
    if other:
        found, expected = (", ".join(f"{name} {sizes[name]}" for name in other) for sizes in (wanted, own))
        raise ValueError(f"sizes: found {found}, expected {expected} as {file} has it for the weights, or none")


def base_warnings(out: Path) -> list[str]:
    """A warning where the base of a run scores near zero before adaptation, though its head fits."""
    path = out / "before.json"
    dice = float(read_json(path)["dice"]) if path.is_file() else 1.0
    if not dice < NEAR_ZERO:  # NaN where no label has a class
        return []
    return [
        f"warning: the base scores near zero before adaptation (Dice {100 * dice:.1f}), though its head has as many "
        "classes: its classes may be others or in another order, or it was trained for other intensities, voxel sizes "
        "or a part of the body"
    ]


def _told(file: Path, form: Form | None, tensors: Mapping[str, Tensor]) -> str:
    """The network that a ViT's encoder fits; ValueError where that is not clear."""
    reason = ""
    if form is not None:
        first = next(tensor for name, tensor in tensors.items() if "patch_embeddings" in name and tensor.ndim > 1)
        blocks = sum(name.startswith(f"{form.prefix}blocks.") and "linear1.weight" in name for name in tensors)
        if blocks != UNETR_BLOCKS or (first.ndim == 5 and first.shape[2] != get_spec("unetr").multiple):
            return "vit"
        reason = "; this is the encoder of a ViT, which unetr and vit have"
    raise ValueError(
        f"{file}: {len(tensors)} tensors but no network.json beside them; expected it or --network{reason}"
    )


def _plain(
    file: Path, tensors: Mapping[str, Tensor], form: Form | None, spec: NetworkSpec, wanted: Wanted
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    if form is None:
        return dict(tensors), [], []
    patch = spec.multiple if spec.name == "unetr" else wanted.sizes.get("patch_size")
    try:
        return plain_tensors(tensors, form, patch)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _config(
    file: Path, form: Form | None, tensors: Mapping[str, Tensor], spec: NetworkSpec, wanted: Wanted,
    bundle: Bundle | None,
) -> tuple[NetworkConfig, list[str]]:  # fmt: skip
    """The network of a file without network.json, and in words what was told from its tensors."""
    given = {**(bundle.sizes if bundle else {}), **wanted.sizes}
    roi = wanted.roi or (bundle.roi if bundle else None)
    if form is None:
        return NetworkConfig(spec.name, 1, 2, roi or _WINDOW, None, given), []
    found = infer_sizes(spec, tensors)
    notes = []
    if "hidden_size" in found and "num_heads" not in given:
        heads = infer_heads(spec, found["hidden_size"])
        if heads is None:
            raise ValueError(
                f"{file}: found a hidden size of {found['hidden_size']}, which does not tell the number of attention "
                """heads; expected it in --sizes '{"num_heads": N}'"""
            )
        found["num_heads"] = heads
        notes.append(f"{heads} attention heads are assumed, which weights do not say")
    if roi is None and PLACES in tensors:
        roi = infer_window(tensors)
        if roi is None:
            places = tensors[PLACES].shape[1]
            raise ValueError(f"{file}: found {places} patches, which are no cube; expected their window in --roi")
    config = NetworkConfig(spec.name, 1, 2, roi or _WINDOW, None, {**found, **given})
    other = {key: value for key, value in found.items() if value != spec.sizes[key] and key not in given}
    sizes = f" with {', '.join(f'{key} {value}' for key, value in other.items())}" if other else ""
    window = "x".join(map(str, config.roi))
    return config, [f"network {spec.name}{sizes}, window {window}, as told from the weights", *notes]


def with_channels(
    tensors: Mapping[str, Tensor], spec: NetworkSpec, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of the first layers for another number of input channels: their mean, repeated and scaled.

    An image with the same content in every channel gives the same activations as before.

    Args:
        tensors: Of a file, under the network's names.
        spec: Of the network.
        state: Of the network.

    Returns:
        The tensors, and what was changed in words.
    """
    changed, said = dict(tensors), []
    for name in spec.inputs:
        if name not in tensors or name not in state or tensors[name].ndim != state[name].ndim:
            continue
        found, expected = tensors[name].shape[1], state[name].shape[1]
        if found != expected and tensors[name].is_floating_point():
            mean = tensors[name].mean(1, keepdim=True) * (found / expected)
            changed[name] = mean.expand(-1, expected, *tensors[name].shape[2:]).contiguous()
            said = [
                f"made for {found} input channels, adapted to {expected}: the first layers' mean over them, repeated"
            ]
    return changed, said


def _of_encoder(
    tensors: Mapping[str, Tensor], outside: list[str], random: tuple[str, ...], spec: NetworkSpec
) -> list[str]:
    """The report on an encoder's weights."""
    lines = [
        f"an encoder alone, of which {len(tensors)} tensors are loaded; {', '.join(random)} start at random",
        "the decoder trains beside every adapter",
    ]
    if outside:
        left = Counter(name.partition(".")[0] for name in outside)
        lines.insert(1, f"left out: {', '.join(f'{name} ({count})' for name, count in left.items())}")
    still = [part for part in random if not has_prefix(f"{part}.", spec.decoder)]
    if still:
        lines.append(f"{', '.join(still)} stay as they start, unless the method trains all parameters (full)")
    return lines
