"""Files of a bank: adapter files that are checked against its model, and one file of many adapters.

The file of many is a safetensors file. Tensors: ``cores.<stack>`` (N, S, c, r), ``rows.<stack>``, ``columns.<stack>``;
``col.<stack>`` and ``row.<stack>`` where they are not those of the base; ``beside.<parameter>`` (N, ...), such as
``beside.head.weight``, of modules of which each adapter has its own: such a file has format 2, another one 1. Header:
``tcurlora_bank`` -> format version, the N names, transform, core domain and, where factors are learned or orthonormal,
which and the subspace's digest; for every stack its slices, scale, and the dtype and fingerprint of its base weights;
and the digest, SHA-256 of all of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.files.format import read_adapter
from tcurlora_ext.adapter.model.structure import base_weights, changed_buffers, require_adapted, stacks, trained_beside
from tcurlora_ext.adapter.options import LEARNED, WEIGHTS, StackOptions
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.described import description, digest
from tcurlora_ext.io.tensors import not_finite, read_tensors
from tcurlora_ext.maths.fingerprint import fingerprint, mismatch

from .modules import OwnModules
from .store import Cores

FORMAT, FORMAT_BESIDE = 1, 2  # with what adapters have beside their cores, which earlier readers would leave out
HEADER = "tcurlora_bank"
# What a file does not state: files before learned factors have none of it.
BEFORE_LEARNED = {"factors": WEIGHTS, "orthonormal factors": False, "subspace": None}
ADAPTER_FILE = "adapter.safetensors"  # as save_adapter names the file in a folder


def subspace_of(model: nn.Module) -> Subspace | None:
    """The subspace of an adapted model's learned factors."""
    return require_adapted(model).container.subspace


class Checks:
    """Reads and writes files for one model, whose fingerprints are taken when the first file needs them.

    Args:
        model: The adapted model.
        stacks_: Its stacks by name.
        modules: The modules of which each adapter has its own.
    """

    def __init__(self, model: nn.Module, stacks_: Mapping[str, TCURStack], modules: OwnModules) -> None:
        self._model, self._stacks, self._modules = model, stacks_, modules
        self._subspace = subspace_of(model)
        self._bases: dict[str, tuple[Tensor, torch.dtype, bool]] = {}

    def cores_of(self, name: str, source: Mapping[str, Tensor] | nn.Module | None) -> Cores | None:
        """The cores of a source and its own parameters beside them, checked; None for zeros.

        Raises:
            ValueError: They do not fit the stacks, or are not finite.
        """
        if source is None:
            return None
        if isinstance(source, nn.Module):
            found = stacks(source)
            _require_same_names(name, found, self._stacks)
            for stack_name, stack in found.items():
                here = self._stacks[stack_name]
                _require_same(name, stack_name, _layout(stack, subspace_of(source)), _layout(here, self._subspace))
            adapted = require_adapted(source)
            if adapted.model is not self._model:  # what the bank's own model has beside them, all adapters share
                self._modules.refuse(f"adapter {name!r}", [*trained_beside(adapted), *changed_buffers(adapted, 0.01)])
            source = {stack_name: stack.core.detach() for stack_name, stack in found.items()}
            source |= self._modules.of(adapted.model)
        own = self._modules.base
        _require_same_names(name, {key: value for key, value in source.items() if key not in own}, self._stacks)
        for key, value in source.items():
            expected = tuple((own[key] if key in own else self._stacks[key].core).shape)
            if tuple(value.shape) != expected or not value.is_floating_point():
                raise ValueError(
                    f"adapter {name!r}: {self._called(key)} is {value.dtype} {tuple(value.shape)}, expected "
                    f"floating numbers {expected}"
                )
        broken = not_finite(source)
        if broken:
            raise ValueError(f"adapter {name!r}: {self._called(broken[0])} has NaN or infinite values")
        return source

    def _called(self, key: str) -> str:
        return key if key in self._modules.base else f"the core of stack {key}"

    def read(self, path: str | os.PathLike[str]) -> tuple[Cores, str]:
        """The cores of an adapter file, its own parameters beside them, and the name that file or folder gives it."""
        file = read_adapter(path, (self._subspace,))
        trained = file.under("trained")
        self._modules.refuse(str(file.path), [*trained, *file.under("state")])
        options = _options(file.config.stack_options(), file.subspace)
        self._require(file.path, file.stacks, file.tensors, options)
        named_by_folder = file.path.name == ADAPTER_FILE and file.path.parent.name
        return file.under("core") | trained, file.path.parent.name if named_by_folder else file.path.stem

    def _require(
        self, path: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> None:
        """Raise ValueError, naming the stack, unless the file's stacks are those of the model."""
        _require_same_names(str(path), described, self._stacks)
        for name, stack in self._stacks.items():
            there = described[name]
            indices = {kind: tensors[f"{kind}.{name}"] for kind in ("rows", "columns")}
            core = tensors[f"core.{name}" if f"core.{name}" in tensors else f"cores.{name}"]
            found = {
                "layers": there["names"],
                "rank": tuple(core.shape[-2:]),
                "blocks": core.shape[-3],
                **options,
                "scale": there["scale"],
                **indices,
            }
            _require_same(str(path), name, found, _layout(stack, self._subspace))
            factors = {kind: tensors[f"{kind}.{name}"] for kind in ("col", "row") if f"{kind}.{name}" in tensors}
            for kind, factor in factors.items():
                here = getattr(stack, kind).detach().cpu()
                if not torch.equal(factor.to(here.dtype), here):
                    raise ValueError(f"{path}: stack {name} has other factors ({kind}) than the bank's model")
            if not factors:
                self._require_base(path, name, there)

    def _require_base(self, path: Path, name: str, described: Mapping[str, Any]) -> None:
        found, dtype, factors_of_base = self._base(name)
        if not factors_of_base:
            raise ValueError(
                f"{path}: stack {name} of the bank's model has factors that are not those of its base weights, as the "
                "file's are"
            )
        saved = torch.tensor(described["fingerprint"], dtype=torch.float64)
        other = mismatch(saved, found, described["base_dtype"], dtype)
        if other:
            raise ValueError(
                f"{path}: trained on other base weights: {len(other)} of {len(saved)} slices of stack {name} differ, "
                f"first {described['names'][other[0]]}"
            )

    def _base(self, name: str) -> tuple[Tensor, torch.dtype, bool]:
        """The fingerprint and dtype of a stack's base weights, and whether its factors are theirs."""
        if name not in self._bases:
            stack = self._stacks[name]
            weights = base_weights(self._model, stack)
            self._bases[name] = fingerprint(weights), weights.dtype, stack.is_of(weights)
        return self._bases[name]

    def write(self, path: Path, adapters: Mapping[str, Cores]) -> Path:
        """Write a file of many adapters."""
        tensors: dict[str, Tensor] = {}
        described = {}
        for name, stack in self._stacks.items():
            cores = [adapter[name].cpu() for adapter in adapters.values()]
            tensors[f"cores.{name}"] = torch.stack(cores) if cores else torch.empty(0, *stack.core.shape)
            tensors |= {f"{kind}.{name}": index.cpu().clone() for kind, index in _indices(stack).items()}
            prints, dtype, factors_of_base = self._base(name)
            if not factors_of_base:
                tensors |= {kind: getattr(stack, kind[:3]).cpu().clone() for kind in (f"col.{name}", f"row.{name}")}
            described[name] = {
                "names": stack.names, "scale": stack.scale, "base_dtype": str(dtype).removeprefix("torch."),
                "fingerprint": prints.tolist(),
            }  # fmt: skip
        for name, value in self._modules.base.items():
            values = [adapter[name].cpu() for adapter in adapters.values()]
            tensors[f"beside.{name}"] = torch.stack(values) if values else torch.empty(0, *value.shape)
        broken = not_finite(tensors)
        if broken:
            raise ValueError(f"{broken[0]} has NaN or infinite values; {path} is as it was")
        options = next(iter(self._stacks.values())).options
        header = {
            "format": FORMAT_BESIDE if self._modules.base else FORMAT, "names": list(adapters), "stacks": described,
            "options": {k: v for k, v in _options(options, self._subspace).items() if v != BEFORE_LEARNED.get(k)},
        }  # fmt: skip
        write_bytes(path, safetensors.torch.save(tensors, {HEADER: description(header, tensors)}))
        return path

    def read_all(self, path: Path) -> dict[str, Cores]:
        """The adapters of a file of :meth:`write`: name -> stack -> core, and what is beside them."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file of a bank")
        metadata, tensors = read_tensors(path, "a file that AdapterBank.save wrote")
        if HEADER not in metadata:
            raise ValueError(f"{path}: found a safetensors file without a {HEADER!r} header, expected one of a bank")
        try:
            header = dict(json.loads(metadata[HEADER]))
            stated = header.pop("digest")
            version, names, described, options = (header[key] for key in ("format", "names", "stacks", "options"))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the description of the bank is damaged: {error!r}") from None
        if version not in (FORMAT, FORMAT_BESIDE):
            raise ValueError(f"{path}: found format {version!r} of a bank, expected {FORMAT} or {FORMAT_BESIDE}")
        if stated != digest(header, tensors):
            raise ValueError(f"{path}: the file is damaged: its content has another digest than the one that it states")
        beside = {name.removeprefix("beside."): tensors[name] for name in tensors if name.startswith("beside.")}
        if names:
            self._modules.refuse(str(path), beside)
        self._require(path, described, tensors, BEFORE_LEARNED | options)
        found = {name: tensors[f"cores.{name}"] for name in self._stacks} | beside
        return {adapter: {name: values[at] for name, values in found.items()} for at, adapter in enumerate(names)}


def _options(options: StackOptions, subspace: Subspace | None) -> dict[str, Any]:
    """What all stacks of an adapter have in common, as far as it decides what cores mean."""
    return {
        "transform": options.transform,
        "core domain": options.core_domain,
        "factors": options.factors,
        "orthonormal factors": options.orthonormal and options.factors != LEARNED,  # learned ones are in any case
        "subspace": None if subspace is None else subspace.digest,
    }


def _layout(stack: TCURStack, subspace: Subspace | None) -> dict[str, Any]:
    """What the cores of a stack mean, in the order in which differences are reported."""
    return {
        "layers": stack.names,
        "rank": stack.rank,
        "blocks": stack.blocks,
        **_options(stack.options, subspace),
        **_indices(stack),
        "scale": stack.scale,
    }


def _indices(stack: TCURStack) -> dict[str, Tensor]:
    return {"rows": stack.rows, "columns": stack.columns}


def _require_same_names(who: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if found.keys() != expected.keys():
        raise ValueError(
            f"{who}: its stacks are {', '.join(found) or 'none'}, those of the bank's model {', '.join(expected)}"
        )


def _require_same(who: str, stack: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError for the first entry in which a stack differs from that of the bank."""
    for entry, here in expected.items():
        there = found[entry]
        if isinstance(here, Tensor):
            same = torch.equal(there.cpu(), here.cpu())
            there, here = there.tolist(), here.tolist()
        elif isinstance(here, float):
            same = math.isclose(there, here, rel_tol=1e-12)
        else:
            same = there == here
        if not same:
            raise ValueError(f"{who}: stack {stack} has {entry} {there!r:.80}, that of the bank's model {here!r:.80}")
