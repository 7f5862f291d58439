"""LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): a core between singular vectors of the first gradients' signs.

The gradients of whole weights are summed over some batches of the training cases. A first step of sign descent would
change a weight by D = -step * sign(sum). The leading singular vectors of D are frozen factors, and the core between
them begins as the diagonal of its singular values: the model starts at the best approximation of rank r of that step,
not at the base. The batches are counted as warm-up steps.

The factors depend on the training cases: the file holds them beside the cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.segmentation.networks import NetworkSpec, target_layers
from tcurlora_ext.segmentation.training import loss_step, trainable

from .base import Method, MethodOptions, Prepare, Task, beside, copy_trained, read_parameters, write_parameters
from .lora_xs import CoreLinear
from .wrapping import leading_vectors, linear, merge, wrap

FACTORS = "factors.safetensors"  # of a run, so that it does not compute them again when it goes on
LEFT, RIGHT, VALUES = ".left", ".right", ".values"


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    if task is None:
        raise ValueError("lora-sb takes its factors from gradients on the training cases, which are not given")
    path = task.folder / FACTORS
    if path.is_file():
        factors = read_tensors(path, "the factors of LoRA-SB")[1]
    else:
        model.to(task.device)
        task.say(f"a warm-up of {_batches(options):,} batches, whose gradients give the factors")
        factors = _learned(model, options, task)
        _keep(factors, path)
    _put_in(model, spec, options, factors)


def _check(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    beside(spec, options)
    for name in target_layers(model):
        linear(name, model.get_submodule(name), METHOD.option(options, "rank"))


def _batches(options: MethodOptions) -> int:
    return int(METHOD.option(options, "batches"))


def _put_in(model: nn.Module, spec: NetworkSpec, options: MethodOptions, factors: Mapping[str, Tensor]) -> None:
    def make(name: str, layer: nn.Module) -> CoreLinear:
        left, right, values = (factors[name + part].to(linear(name, layer).weight) for part in (LEFT, RIGHT, VALUES))
        return CoreLinear(linear(name, layer), left, right, -METHOD.option(options, "step") * torch.diag(values))

    wrap(model, target_layers(model), make, spec, options)


def _learned(model: nn.Module, options: MethodOptions, task: Task) -> dict[str, Tensor]:
    """The leading singular vectors and values of the signs of the summed gradients, by the layers' names."""
    rank, step = METHOD.option(options, "rank"), loss_step(task.volumes, task.plan)
    layers = {name: linear(name, model.get_submodule(name), rank) for name in target_layers(model)}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    with torch.random.fork_rng():
        for _ in range(_batches(options)):
            torch.autograd.backward(step(model))
    factors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.weight.grad is not None
        left, values, right = leading_vectors(layer.weight.grad.sign(), rank)
        factors |= {name + LEFT: left, name + RIGHT: right.T.contiguous(), name + VALUES: values}
        layer.weight.grad = None
    return factors


def _keep(factors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: tensor.cpu().clone() for name, tensor in factors.items()}))


def _save(model: nn.Module, path: Path, options: MethodOptions) -> None:
    factors = {
        name + part: tensor
        for name, layer in model.named_modules()
        if isinstance(layer, CoreLinear)
        for part, tensor in ((LEFT, layer.left), (RIGHT, layer.right))
    }
    write_parameters({**trainable(model), **factors}, path, options, "lora-sb")


def _load(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    options, tensors = read_parameters(path)
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith((LEFT, RIGHT))}
    missing = [n + part for n in target_layers(model) for part in (LEFT, RIGHT) if n + part not in factors]
    if missing:
        raise ValueError(f"{path}: does not fit the network: {', '.join(missing[:4])} missing")
    ranks = {name.removesuffix(LEFT): t.shape[1] for name, t in factors.items() if name.endswith(LEFT)}
    start = {name + VALUES: torch.zeros(rank) for name, rank in ranks.items()}
    _put_in(model, spec, options, {**factors, **start})
    copy_trained(trainable(model), {n: t for n, t in tensors.items() if n not in factors}, path)


# Not chosen by measurement: that of LoRA here. The first step is that of full fine-tuning here, which it stands for.
METHOD = Method(
    "lora-sb", "LoRA-SB: cores between first gradients' vectors", _prepare, 1e-2, _save, _load, "#7fc97f",
    adapter=True, options={"rank": 8, "batches": 4, "step": 1e-3}, merge=merge,
    warm_up=_batches, check=_check,
)  # fmt: skip
