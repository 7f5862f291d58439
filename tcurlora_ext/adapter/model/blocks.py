"""Which linear layers are adapted where a configuration names none: those in the blocks that a model repeats.

1. A block is repeated where another one has the same name but for a number and they have a linear layer in common, as
   ``layers.3`` and ``layers.4`` have ``mlp.fc1``. All linear layers in both are then adapted, also those of one alone.
2. Heads, embeddings and routers are left out by their names, and layers narrower than the rank by their shapes.
3. Layers that their parent does not call are left out: an adapter in them would do nothing.
4. Names that are known from MONAI and transformers settle doubts: such a layer is adapted also in a single block.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from .support import features_of, is_read_by_attention, reason_against

# Attention and MLP projections as MONAI (UNETR, SwinUNETR, ViT) and transformers (ViT, BERT, CLIP, Llama, Qwen, GPT-2)
# name them. Poolers, embeddings, heads and patch merging do not match.
DEFAULT_TARGETS = (
    r"(.*\.)?("
    r"(attn|self_attn|attention|self)\.(qkv|out_proj|proj|to_[qkv]|[qkvo]_proj|query|key|value|c_attn|c_proj)"
    r"|mlp\.(linear[12]|fc[12]|(gate|up|down)_proj|c_fc|c_proj)"
    r"|(attention\.output|intermediate|(?<!attention\.)output)\.dense"
    r")"
)
_NUMBER = re.compile(r"(.*_)?\d+")  # "3", and "encoder_layer_3" as in torchvision
# A component of a name -> what the layer is then.
_KINDS = {
    "a router": re.compile(r"(.*_)?router"),
    "a head": re.compile(r"(.*_)?(heads?|classifiers?)"),
    "an embedding": re.compile(r"(.*_)?embed(s|der|dings?)?"),
}
# Classes, with their modules, that read the weights of these children themselves. Mamba's layers do so in their fused
# kernels, and call the layers on devices without them.
_READERS = {
    r"timm\.models\.(beit|eva)\.\w*Attention": ("qkv",),
    r"timm\.models\.swin_transformer_v2\.WindowAttention": ("qkv",),
    r"torchvision\.models\.swin_transformer\.ShiftedWindowAttention(V2)?": ("qkv", "proj"),
    r"transformers\.models\.wavlm\.\w+\.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    r"transformers\.models\.\w+\.\w+\.(\w*Mamba2?(Mixer|Layer)|BambaMixer|FalconH1Mixer)": (
        "x_proj", "dt_proj", "out_proj",
    ),
}  # fmt: skip


def left_out_by_default(
    layers: Mapping[str, nn.Module],
    model: nn.Module,
    rank: int,
    check: Callable[[nn.Module], str] = reason_against,
    uncalled: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Why the default leaves a linear layer out, by the names of all; "" for those that it adapts.

    Args:
        layers: The linear layers of the model by name.
        model: The model.
        rank: The larger of c and r.
        check: Why a layer cannot be adapted; "" where it can. A layer of a known name is adapted whatever this says, so
            that an error names it.
        uncalled: Layers that their parents do not call, and why, beside those that are known for it.
    """
    repeated, uncalled = repeated_names(layers), {**(uncalled or {}), **not_called(model)}
    routers = {f"{name}.gate".lstrip(".") for name, module in model.named_modules() if hasattr(module, "experts")}

    def reason(name: str, module: nn.Module) -> str:
        if name in uncalled:
            return uncalled[name]
        if re.fullmatch(DEFAULT_TARGETS, name) and not is_read_by_attention(module):
            return ""
        if name in routers:
            return "a router"
        kind = next((kind for kind, named in _KINDS.items() if any(map(named.fullmatch, name.split(".")))), "")
        if kind:
            return kind
        if name not in repeated:
            return "outside repeated blocks"
        if min(features_of(module)) < rank:
            return f"narrower than the rank {rank}"
        return check(module)

    return {name: reason(name, module) for name, module in layers.items()}


def repeated_names(names: Iterable[str]) -> set[str]:
    """The names of the layers that are in repeated blocks, among the names of all linear layers."""
    blocks: dict[str, list[tuple[str, str, str]]] = {}  # name -> (path before a number, number, path after it)
    numbers: dict[tuple[str, str], set[str]] = defaultdict(set)  # the paths around a number -> the numbers there
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts[:-1]):
            if _NUMBER.fullmatch(part):
                before = ".".join([*parts[:at], part.rstrip("0123456789")])
                after = ".".join(parts[at + 1 :])
                numbers[before, after].add(part)
                blocks.setdefault(name, []).append((before, part, after))
    places = [place for around in blocks.values() for place in around]
    repeated = {(before, part) for before, part, after in places if len(numbers[before, after]) > 1}
    return {name for name, around in blocks.items() if any((before, part) in repeated for before, part, _ in around)}


def bypassed(model: nn.Module) -> dict[str, str]:
    """The modules that are known not to be called by their parent, for PEFT's models: name -> reason.

    :func:`tcurlora_ext.inject` lets them be called (``parameters.py``).
    """
    reason = (
        "its parent, an nn.TransformerEncoderLayer, reads its weight in eval mode and does not call it, where an "
        "adapter of PEFT would do nothing; use tcurlora_ext.inject, which adapts it"
    )
    return {
        f"{name}.{child}".lstrip("."): reason
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for child, _ in module.named_children()
    }


def not_called(model: nn.Module) -> dict[str, str]:
    """The modules that a class of another package has, but does not always call: name -> reason.

    They may be adapted by name: the first call of the model shows whether it calls them.
    """
    found = {}
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        children = next((children for reader, children in _READERS.items() if re.fullmatch(reader, kind)), ())
        for child in children:
            found[f"{name}.{child}".lstrip(".")] = f"{type(module).__name__} may read its weight in place of calling it"
        if getattr(module, "with_cross_attention", None) is False:  # MONAI's TransformerBlock up to 1.5
            for child, _ in module.named_modules():
                if child.startswith("cross_attn."):
                    found[f"{name}.{child}".lstrip(".")] = f"{type(module).__name__} does not call its cross-attention"
    return found
