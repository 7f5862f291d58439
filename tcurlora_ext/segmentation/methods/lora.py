"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT, in the layers that tCUR adapts but for transposed convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tcurlora_ext.maths import coding
from tcurlora_ext.segmentation.networks import NetworkSpec
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.training import trainable

from .base import Method, MethodOptions, Prepare, Task, Unset, copy_trained, read_parameters, write_parameters
from .by_peft import inject, layers_of, merge

A, B = "lora_A", "lora_B"
STEP = ".step"  # after a coded matrix's name: what its vectors' levels are multiplied by


def _prepare(model: nn.Module, spec: NetworkSpec, options: MethodOptions, task: Task | None = None) -> None:
    """PEFT's LoRA in the layers that tCUR adapts, from random A or from the adapter of an earlier run."""
    require_package("peft")
    from peft import LoraConfig

    rank = METHOD.option(options, "rank", options.lora_rank)
    inject(
        model, spec, options, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers_of(model, spec, options, True))
    )
    if task is not None and METHOD.option(options, "init"):
        _begin_with(model, Path(METHOD.option(options, "init")))


def _check(model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
    bits, init = METHOD.option(options, "bits"), METHOD.option(options, "init")
    if bits not in coding.BITS:
        raise ValueError(f"bits: found {bits}, expected one of {', '.join(map(str, coding.BITS))}")
    _prepare(model, spec, options)
    if init:
        _begin_with(model, Path(init))


def _begin_with(model: nn.Module, path: Path) -> None:
    """Give A and B the values of a LoRA of the same rank that another run has trained."""
    _, tensors = read_parameters(path)
    adapter = {name: p for name, p in model.named_parameters() if _is_factor(name)}
    copy_trained(adapter, {name: value for name, value in decoded(tensors).items() if _is_factor(name)}, path)


def _is_factor(name: str) -> bool:
    return f".{A}." in name or f".{B}." in name


def _save(model: nn.Module, path: Path, options: MethodOptions) -> None:
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trainable(model).items()}
    bits = METHOD.option(options, "bits")
    write_parameters(coded(tensors, bits) if bits < coding.WHOLE else tensors, path, options)


def _load(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    options, tensors = read_parameters(path)
    prepare(model, spec, options, None)
    copy_trained(trainable(model), decoded(tensors), path)


def coded(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """A and B in b bits an entry, with a step in float16 for every row of A and column of B; the rest as it is."""
    result = dict(tensors)
    for name in filter(_is_factor, tensors):
        columns = tensors[name].cpu().double() if f".{B}." in name else tensors[name].cpu().double().T
        levels = coding.rounded(columns, bits)
        steps = (levels * columns).sum(0) / levels.double().square().sum(0)
        result[name] = coding.pack(levels, bits)
        result[name + STEP] = steps.half()
        result[name + ".shape"] = torch.tensor([*columns.shape, bits])
    return result


def decoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`coded`, up to what the code has lost."""
    result = {name: t for name, t in tensors.items() if not name.endswith((STEP, ".shape"))}
    for name in [name for name in result if name + STEP in tensors]:
        *shape, bits = tensors[name + ".shape"].tolist()
        columns = coding.decode(tensors[name], bits, tuple(shape)) * tensors[name + STEP].double()
        result[name] = (columns if f".{B}." in name else columns.T).float().contiguous()
    return result


# The best of 1e-3, 3e-3, 1e-2 and 3e-2 (which does not learn) in 100 to 120 steps on embedded subjects. Without a
# rank it has that of the run's option --lora-rank.
METHOD = Method(
    "lora", "LoRA (PEFT)", _prepare, 1e-2, _save, _load, "#e69f00", adapter=True,
    options={"rank": Unset(int), "bits": 32, "init": ""}, standard=True, check=_check, merge=merge,
)  # fmt: skip
