"""Ways to adapt a pretrained network, by name. A method decides what trains, and saves and loads what has trained.

To add a method, add an entry to `METHODS`: a function that prepares a model in place, and functions that save and load
its adapter file.
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
    """Options of all methods.

    Attributes:
        also_train: What trains beside an adapter: "head", or "decoder", which includes the head.
        rank: Tubal rank of tCUR.
        alpha: Factor on tCUR's default scale.
        lora_rank: Rank of LoRA; its lora_alpha is the same, so that its scale is 1.
        seed: Of the adapters' initialisation.
    """

    also_train: str = "head"
    rank: int = 8
    alpha: float = 4.0
    lora_rank: int = 8
    seed: int = 0


Prepare = Callable[[nn.Module, NetworkSpec, MethodOptions], None]


@dataclass(frozen=True)
class Method:
    """One way to adapt a network.

    Attributes:
        name: In options, folders and tables.
        description: What trains, in a few words.
        prepare: Freezes what does not train and adds the adapter, in place.
        lr: Peak learning rate of Adam.
        save: Writes what has trained.
        load: Prepares a model and reads that file into it.
        adapter: Whether `lr` is for an adapter alone; the head or decoder that trains beside it then has the learning
            rate of the method "head" or "decoder".
    """

    name: str
    description: str
    prepare: Prepare
    lr: float
    save: Callable[[nn.Module, Path, MethodOptions], None]
    load: Callable[[nn.Module, Path, NetworkSpec, Prepare], None]
    adapter: bool = False


def train_only(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Require gradients for the parameters whose names start with one of the prefixes, and for no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(has_prefix(name, prefixes))


def beside(spec: NetworkSpec, options: MethodOptions) -> tuple[str, ...]:
    """Name prefixes of the parameters that train beside an adapter. ValueError where `also_train` is unknown."""
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
    """PEFT's LoRA in the layers that tCUR adapts: the attention and MLP projections."""
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
    """tCURLoRA in the same layers: one core for all weights of a shape, with q, k and v as separate slices."""
    import tcurlora_ext as tcur

    prefixes = beside(spec, options)
    tcur.inject(model, tcur.TCURConfig(rank=options.rank, alpha=options.alpha, seed=options.seed))
    tcur.unfreeze(model, [re.escape(prefix) for prefix in prefixes])


def _save_trained(model: nn.Module, path: Path, options: MethodOptions) -> None:
    """Write the trained parameters as safetensors, with the options in the file's header."""
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


# Each peak learning rate was the best of these, in 100 to 120 steps on embedded subjects, some of them with half the
# target's noise: head 1e-3, 1e-2, 3e-2, 1e-1; decoder 3e-3, 1e-2; full 1e-3, 3e-3; LoRA 1e-3, 3e-3, 1e-2, 3e-2 (which
# does not learn). For tCUR only 1e-2 was tried.
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
    """Methods by their names, as a sequence or in one string with commas; "all" for all of them.

    Raises:
        ValueError: A name is unknown or given twice.
    """
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    wanted = list(METHODS) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"method: found '{','.join(wanted)}', expected each once of {', '.join(METHODS)} (or 'all')")
    return [METHODS[name] for name in wanted]
