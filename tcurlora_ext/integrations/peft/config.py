"""The configuration of the method in PEFT: fields of PEFT's other methods, and fields of :class:`TCURConfig`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import peft
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.peft_types import PeftType
from torch import Tensor

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.options import WEIGHTS, Rank, StackOptions, explains_lora_names
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.io.atomic import write_bytes

if not hasattr(BaseTuner, "_get_adapter_state_dict"):
    raise ImportError(f"peft {peft.__version__} is installed, expected 0.21 or newer")

TYPE = "TCURLORA"
IMPORT = "import tcurlora_ext.integrations.peft"
FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
BIAS = ("none", "all", "tcurlora_only")

# Rank and alpha have patterns of their own here, and PEFT's adapters train the core alone. All other options of a
# stack, and how stacks are formed, are passed on under the same names.
_OTHERWISE = ("rank", "alpha", "trainable")
_OF_STACKS = (
    *(option.name for option in fields(StackOptions) if option.name not in _OTHERWISE),
    *("stack_by", "stack_blocks", "split_fused"),
)


def peft_type() -> PeftType:
    """The member of ``PeftType`` for this method, added on the first call: PEFT has no function to add one."""
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_ = member._value_ = TYPE
        PeftType._member_map_[TYPE] = member
        PeftType._value2member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
        type.__setattr__(PeftType, TYPE, member)  # how Python 3.12 and later look members up
    return PeftType[TYPE]


@explains_lora_names
@dataclass
class TcurLoraConfig(PeftConfig):
    """The configuration of a t-CUR adapter in PEFT. Fields not described here are those of ``PeftConfig``.

    Args:
        r: Tubal rank, or (c, r): c columns and r rows of every stack.
        alpha: Multiplies the default scale rule; with 1.0 a step has the length of a step of LoRA. Without effect where
            ``scale`` is a number.
        target_modules: None: what :func:`tcurlora_ext.inject` adapts by default, experts included; else as in PEFT's
            LoRA: names, ends of names, a regex for the whole name, or ``"all-linear"``.
        target_parameters: As in PEFT's LoRA: names, or ends of names, of parameters with all experts of a layer, such
            as ``"mlp.experts.gate_up_proj"``. With these and without ``target_modules``, they alone are adapted.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: As in PEFT's LoRA.
        rank_pattern: End of a name, or regex -> rank in place of ``r``. All layers of a stack need the same rank.
        alpha_pattern: End of a name, or regex -> alpha in place of ``alpha``. All layers of a stack need the same.
        init_weights: True: U is zero at the start, so that the model's output is unchanged; False: U is random.
        bias: Which biases train: ``"none"``, ``"all"`` or ``"tcurlora_only"`` (those of the adapted layers).
        fan_in_fan_out: Whether weights are stored as (in, out). The types of the layers decide it: a different value
            is corrected, with a warning.
        save_projection: Whether C and R are saved, which are most of a file. Without them it has their indices and a
            fingerprint of the base weights: loading takes C and R from the base, and refuses weights with another
            fingerprint. None: they are saved where the base may not give them again, to the bit: where it is quantised,
            on the meta device or sharded, or C and R came from another base. Where factors are learned: whether the
            subspace is saved, coded (None: it is); without it the file has its digest, and loading needs it.
        stack_by, stack_blocks, split_fused, selection, scale: As in :class:`tcurlora_ext.TCURConfig`.
        transform, frequencies, core_domain, backend, seed: As in :class:`tcurlora_ext.TCURConfig`.
        factors, orthonormal: As in :class:`tcurlora_ext.TCURConfig`.
        subspace: Learned factors, a :class:`tcurlora_ext.Subspace` or the path of its file; required for a new adapter
            where ``factors`` are learned, refused otherwise. It may be set after :func:`learn_factors`, which takes
            this configuration. A saved configuration has its digest in this place, and the checkpoint has the rest.
        dropout: Share of the adapter's input that is set to zero in training, as LoRA's ``lora_dropout``.
        rank_stabilised: Make the first optimizer step equally long at every rank, as ``use_rslora`` does for LoRA.
        budget: Parameter budget of all cores together, in place of ``r``. When the adapter is added to a model, the
            resulting ranks are written to ``rank_pattern`` and this field is set to None.
        calibration: The result of :func:`calibrate`, for ``selection="activation"``. A checkpoint has the indices
            chosen by these inputs, but not the inputs: in a configuration read from a checkpoint this field is empty,
            and a new adapter with that configuration chooses by "norm".
        trainable_token_indices, layer_replication: As in PEFT's LoRA.
        ensure_weight_tying: As in PEFT's LoRA, for ``modules_to_save`` and ``trainable_token_indices``.

    Attributes:
        was_saved: Whether this is the configuration of a saved adapter.

    Raises:
        FileNotFoundError: There is no file of a subspace at this path.
        ValueError: A value is unknown or out of range; a subspace is given and factors are not learned; options exclude
            each other as in :class:`tcurlora_ext.TCURConfig`; ``layers_pattern`` is given without
            ``layers_to_transform``; or ``layers_to_transform`` is given with a regex for ``target_modules``.
    """

    r: Rank = 8
    alpha: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool = True
    bias: str = "none"
    fan_in_fan_out: bool = False
    save_projection: bool | None = None
    stack_by: str = "shape"
    split_fused: dict[str, int] = field(default_factory=lambda: TCURConfig().to_json()["split_fused"])
    selection: str = "norm"
    scale: float | None = None
    transform: str = "dft"
    core_domain: str = "fourier"
    backend: str = "auto"
    seed: int = 0
    dropout: float = 0.0
    rank_stabilised: bool = False
    budget: int | None = None
    stack_blocks: int | None = None
    frequencies: int | None = None
    factors: str = "weights"
    orthonormal: bool = False
    subspace: Subspace | str | None = field(default=None, repr=False, compare=False)
    calibration: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layer_replication: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        self.was_saved = self.peft_version is not None  # PEFT sets it now, and saves it
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.target_parameters is not None:
            self.target_parameters = list(self.target_parameters)
        # JSON has no tuples.
        self.r = _as_rank(self.r)
        if self.layer_replication is not None:
            self.layer_replication = [(start, end) for start, end in self.layer_replication]
        self.rank_pattern = {name: _as_rank(rank) for name, rank in (self.rank_pattern or {}).items()}
        self.alpha_pattern = dict(self.alpha_pattern or {})
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given, expected layers_to_transform with it")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is given with a regex for target_modules, expected a list of names")
        if self.bias not in BIAS:
            raise ValueError(f"bias is {self.bias!r}, expected one of {', '.join(map(repr, BIAS))}")
        replace(self.for_stack(self.r, self.alpha), rank_pattern=self.rank_pattern, budget=self.budget)
        self.read_subspace()

    def for_stack(self, rank: Rank, alpha: float) -> TCURConfig:
        """The configuration of a stack.

        Args:
            rank: r, or (c, r), of this stack.
            alpha: The alpha of this stack.

        Raises:
            ValueError: :class:`tcurlora_ext.TCURConfig` refuses a value.
        """
        return TCURConfig(rank=rank, alpha=alpha, **{name: getattr(self, name) for name in _OF_STACKS})

    def read_subspace(self) -> Subspace | str | None:
        """The subspace, read from its file where the field is a path; a digest where that is all that is known.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no file of a subspace, or factors are not learned.
        """
        if self.subspace is not None and self.factors == WEIGHTS:
            raise ValueError(
                "a subspace is given and factors is 'weights', expected 'learned' or 'learned_rows' with it"
            )
        if isinstance(self.subspace, (str, os.PathLike)) and not re.fullmatch("[0-9a-f]{64}", str(self.subspace)):
            self.subspace = Subspace.load(self.subspace)
        return self.subspace

    @property
    def subspace_digest(self) -> str | None:
        """The digest of the subspace; None where there is none."""
        found = self.read_subspace()
        return found.digest if isinstance(found, Subspace) else found

    def to_dict(self) -> dict[str, Any]:
        """The values to save: all except the calibration inputs, and the subspace's digest in place of it."""
        saved = copy.copy(self)
        saved.subspace = self.subspace_digest
        saved.calibration = None if self.calibration is None else {}
        return PeftConfig.to_dict(saved)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in PEFT, but the model card also gets the size of the adapter's file, and the import line to load it.

        Args:
            save_directory: The folder.
            **kwargs: Passed on to PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        card = folder / "README.md"
        if not card.exists():
            return
        text = before = card.read_text(encoding="utf-8")
        present = [folder / name for name in FILES if (folder / name).is_file()]
        sizes = "".join(f"`{path.name}`: {path.stat().st_size:,} bytes\n" for path in present)
        text = re.sub(rf"`({'|'.join(FILES)})`: [\d,]+ bytes\n?", "", text).rstrip()
        if IMPORT not in text:
            text += f"\n\nBefore loading this adapter:\n\n```python\n{IMPORT}\n```"
        text = f"{text}\n\n{sizes}".rstrip() + "\n"
        if text != before:
            write_bytes(card, text.encode())


def _as_rank(rank: Any) -> Rank:
    return tuple(rank) if isinstance(rank, list) else rank
