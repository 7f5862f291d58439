"""What a method is, and what methods have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.tensors import read_tensors
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.networks import NetworkSpec, has_prefix
from tcurlora_ext.segmentation.training import Plan, trainable

METHOD_KEY = "method"  # in a file's header: the name of the method that has written it


@dataclass(frozen=True)
class Unset:
    """The default of an option that has no value unless one is given.

    Attributes:
        kind: The type of its values.
    """

    kind: type


@dataclass(frozen=True)
class MethodOptions:
    """Options of all methods.

    Attributes:
        also_train: What trains beside an adapter: "head", or "decoder", which includes the head.
        rank: Tubal rank of tCUR.
        alpha: Factor on tCUR's default scale.
        lora_rank: Rank of LoRA; its lora_alpha is the same, so that its scale is 1.
        seed: Of the adapters' initialisation.
        own: The options that were given after the method's name, by their names there.
    """

    also_train: str = "head"
    rank: int = 8
    alpha: float = 4.0
    lora_rank: int = 8
    seed: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a method is prepared for; only those that look at the training cases need it.

    Attributes:
        volumes: The training cases.
        plan: How the network will be trained on them.
        device: Where.
        folder: Of this method and seed, for what it has learned: a resumed run does not learn it again.
        say: Told what it does before the steps of the run, in words.
    """

    volumes: Sequence[Volume]
    plan: Plan
    device: torch.device
    folder: Path
    say: Callable[[str], None] = lambda text: None


Prepare = Callable[[nn.Module, NetworkSpec, MethodOptions, Task | None], None]


@dataclass(frozen=True)
class Method:
    """One way to adapt a network.

    Attributes:
        name: In options and tables; with the options that were given after it, as ``lora:rank=1``.
        description: What trains, in a few words.
        prepare: Freezes what does not train and adds the adapter, in place.
        lr: Peak learning rate of Adam.
        save: Writes what has trained.
        load: Prepares a model and reads that file into it.
        colour: In figures.
        adapter: Whether `lr` is for an adapter alone; the head or decoder that trains beside it then has the learning
            rate of the method "head" or "decoder".
        options: The options that may be given after its name, with their defaults; None: it has to be given.
            :class:`Unset`: it may be given, and is None otherwise.
        own: Those that were.
        standard: Whether it is one of those that run where none is named.
        warm_up: How many steps on the training cases it takes before those of the run.
        check: Checks the options on a copy of the network, before a run writes anything; None: `prepare` does, which
            has no :class:`Task` then.
        merge: Folds the adapter into the weights of the base in place, so that a step costs no more than the base's;
            None where the method adds nothing to the base, or something that no weights can express.
    """

    name: str
    description: str
    prepare: Prepare
    lr: float
    save: Callable[[nn.Module, Path, MethodOptions], None]
    load: Callable[[nn.Module, Path, NetworkSpec, Prepare], None]
    colour: str
    adapter: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    standard: bool = False
    warm_up: Callable[[MethodOptions], int] = lambda options: 0
    check: Callable[[nn.Module, NetworkSpec, MethodOptions], None] | None = None
    merge: Callable[[nn.Module], object] | None = None

    @property
    def base(self) -> str:
        """The name without options."""
        return base_name(self.name)

    @property
    def folder(self) -> str:
        """The name of its folder in a run."""
        return folder_name(self.name)

    def check_options(self, model: nn.Module, spec: NetworkSpec, options: MethodOptions) -> None:
        """Raise an error where the options do not fit the network, such as a rank above the sizes of its weights.

        Args:
            model: A network that may be changed.
            spec: Of the network.
            options: Those of a run.

        Raises:
            ValueError, FileNotFoundError: They do not fit, or name a file that does not.
        """
        if self.check is not None:
            self.check(model, spec, options)
        else:
            self.prepare(model, spec, options, None)

    def option(self, options: MethodOptions, name: str, unset: Any = None) -> Any:
        """The value of one of its own options.

        Args:
            options: Those of a run.
            name: The option.
            unset: The value of one that is :class:`Unset` and was not given.
        """
        default = self.options[name]
        return options.own.get(name, unset if isinstance(default, Unset) else default)


def base_name(name: str) -> str:
    """A method's name without the options that were given after it."""
    return name.partition(":")[0]


def folder_name(name: str) -> str:
    """The folder of a method in a run: a colon is not allowed in names on every system."""
    return name.replace(":", "_")


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


def save_trained(model: nn.Module, path: Path, options: MethodOptions, method: str = "") -> None:
    """Write the trained parameters as safetensors, with the options in the file's header."""
    write_parameters({name: p.detach() for name, p in trainable(model).items()}, path, options, method)


def saves_as(method: str) -> Callable[[nn.Module, Path, MethodOptions], None]:
    """:func:`save_trained` for a method whose name the file has to hold, as its parameters' names do not tell it."""
    return partial(save_trained, method=method)


def write_parameters(
    tensors: Mapping[str, torch.Tensor], path: Path, options: MethodOptions, method: str = ""
) -> None:  # fmt: skip
    """Write tensors as safetensors, with the options, and the method where it is given, in the file's header."""
    from safetensors.torch import save

    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"options": json.dumps(asdict(options), default=str)} | ({METHOD_KEY: method} if method else {})
    write_bytes(path, save(content, header))


def read_parameters(path: Path) -> tuple[MethodOptions, dict[str, torch.Tensor]]:
    """Options and tensors of a file by :func:`write_parameters`.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it is no adapter of this command.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an adapter written by this command")
    header, tensors = read_tensors(path, "an adapter written by this command")
    try:
        return MethodOptions(**json.loads(header["options"])), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an adapter written by this command ({error!r})") from None


def load_trained(model: nn.Module, path: Path, spec: NetworkSpec, prepare: Prepare) -> None:
    """Prepare a model as a file of :func:`save_trained` says, and give it the file's parameters."""
    options, tensors = read_parameters(path)
    prepare(model, spec, options, None)
    copy_trained(trainable(model), tensors, path)


@torch.no_grad()
def copy_trained(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into the parameters of these names. ValueError where names or shapes differ."""
    other = [
        name
        for name in sorted(set(tensors) | set(parameters))
        if name not in tensors or name not in parameters or tensors[name].shape != parameters[name].shape
    ]
    if other:
        raise ValueError(f"{path}: does not fit the network: {', '.join(other[:4])} differ")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
