"""Ways to adapt a pretrained network, by name. Each says what trains, and saves and loads just that.

A further method is one more entry of `METHODS`: a function that prepares a model in place, and, where its file is not
simply the trained tensors, functions that save and load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix, target_linears
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.training import trainable


@dataclass(frozen=True)
class MethodOptions:
    """Options of all methods. `also_train`: "head" or "decoder", trained beside an adapter (the decoder has the head).

    `rank` and `alpha` are tCUR's (alpha of its scale rule), `lora_rank` LoRA's (lora_alpha = rank, so a factor of 1).
    """

    also_train: str = "head"
    rank: int = 8
    alpha: float = 4.0
    lora_rank: int = 8
    seed: int = 0


Prepare = Callable[[nn.Module, NetworkSpec, MethodOptions], None]


@dataclass(frozen=True)
class Method:
    """One way to adapt: `prepare` freezes what does not train and adds what does, in place.

    `lr` is the peak learning rate of Adam. With `adapter`, it is the adapter's alone, and the head or decoder beside it
    keeps the rate it has when trained by itself.
    """

    name: str
    description: str
    prepare: Prepare
    lr: float
    save: Callable[[nn.Module, Path, MethodOptions], None]
    load: Callable[[nn.Module, Path, NetworkSpec, Prepare], None]
    adapter: bool = False


def train_only(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Make the parameters under `prefixes` train and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(has_prefix(name, prefixes))


def beside(spec: NetworkSpec, options: MethodOptions) -> tuple[str, ...]:
    """Prefixes of what trains beside an adapter. ValueError for anything but "head" or "decoder"."""
    parts = {"head": spec.head, "decoder": spec.decoder}
    if options.also_train not in parts:
        raise ValueError(f"also-train: found '{options.also_train}', expected one of {', '.join(parts)}")
    return parts[options.also_train]


def _prepare_head(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    train_only(model, spec.head)


def _prepare_decoder(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    train_only(model, spec.decoder)


def _prepare_full(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    model.requires_grad_(True)


def _prepare_lora(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    """PEFT's LoRA in the attention and MLP projections, those that tCUR adapts."""
    require_package("peft")
    from peft import LoraConfig, inject_adapter_in_model

    prefixes = beside(spec, options)
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules=target_linears(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or has_prefix(name, prefixes))


def _prepare_tcur(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    """tCURLoRA in the same projections, one core a stack of equal shape, q, k and v as slices of their own."""
    import tcurlora_ext as tcur

    prefixes = beside(spec, options)
    tcur.inject(model, tcur.TCURConfig(rank=options.rank, alpha=options.alpha, seed=options.seed))
    tcur.unfreeze(model, [re.escape(prefix) for prefix in prefixes])


def _save_trained(model: nn.Module, path: Path, options: MethodOptions) -> None:
    """The trained tensors as safetensors, the options in its header."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in trainable(model).items()}
    write_bytes(path, save(tensors, {"options": json.dumps(asdict(options))}))


@torch.no_grad()
def _load_trained(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an adapter written by this command")
    header, tensors = read_tensors(path, "an adapter written by this command")
    try:
        options = MethodOptions(**json.loads(header["options"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an adapter written by this command ({error!r})") from None
    prepare(model, spec, options)
    parameters: Mapping[str, nn.Parameter] = trainable(model)
    other = [
        name
        for name in sorted(set(tensors) | set(parameters))
        if name not in tensors or name not in parameters or tensors[name].shape != parameters[name].shape
    ]
    if other:
        raise ValueError(f"{path}: does not fit the network: {', '.join(other[:4])} differ")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _save_tcur(model: nn.Module, path: Path, options: MethodOptions) -> None:
    import tcurlora_ext as tcur

    tcur.save_adapter(model, path)  # writes atomically by itself


def _load_tcur(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    import tcurlora_ext as tcur

    tcur.load_adapter(model, path)


# Peak learning rates: the best of those tried, 100 to 120 steps on embedded subjects, first at half the target's noise:
# head 1e-3, 1e-2, 3e-2, 1e-1; decoder 3e-3, 1e-2; full 1e-3, 3e-3; LoRA 1e-3, 3e-3, 1e-2, 3e-2 (fails); tCUR 1e-2.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("head", "output head alone", _prepare_head, 1e-1, _save_trained, _load_trained),
        Method("decoder", "decoder and head", _prepare_decoder, 1e-2, _save_trained, _load_trained),
        Method("full", "all parameters", _prepare_full, 1e-3, _save_trained, _load_trained),
        Method("lora", "LoRA (PEFT) in the transformer", _prepare_lora, 1e-2, _save_trained, _load_trained, True),
        Method("tcur", "tCURLoRA in the transformer", _prepare_tcur, 1e-2, _save_tcur, _load_tcur, True),
    )
}


def get_methods(names: str | Sequence[str]) -> list[Method]:
    """Methods from a comma separated list (or "all"), each once; ValueError lists the known ones."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    wanted = list(METHODS) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"method: found '{','.join(wanted)}', expected each once of {', '.join(METHODS)} (or 'all')")
    return [METHODS[name] for name in wanted]
