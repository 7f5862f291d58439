"""tCURLoRA: adapt frozen networks by training a tiny core U between columns and rows of their own weights."""

from .adapter.bank import AdapterBank
from .adapter.config import TCURConfig
from .adapter.distributed.sharding import shard
from .adapter.files.loading import load_adapter
from .adapter.files.lora import to_lora
from .adapter.files.saving import save_adapter
from .adapter.layer.convolution import TCURConv
from .adapter.layer.linear import TCURLinear
from .adapter.learning.change import factors_of_change
from .adapter.learning.warmup import learn_factors
from .adapter.model.calibration import calibrate
from .adapter.model.export import plain_copy
from .adapter.model.inject import inject, remove, unfreeze
from .adapter.model.merge import merge, unmerge
from .adapter.model.structure import stacks
from .adapter.model.summary import summary
from .adapter.stack import TCURStack
from .adapter.subspace import Subspace
from .maths import reference, tproduct
from .operator import functional
from .operator.backends import backends

__version__ = "0.2.0"  # pyproject.toml reads it from here; a literal, so that no build has to import this file

__all__ = [
    "AdapterBank",
    "Subspace",
    "TCURConfig",
    "TCURConv",
    "TCURLinear",
    "TCURStack",
    "backends",
    "calibrate",
    "factors_of_change",
    "functional",
    "inject",
    "learn_factors",
    "load_adapter",
    "merge",
    "plain_copy",
    "reference",
    "remove",
    "save_adapter",
    "shard",
    "stacks",
    "summary",
    "to_lora",
    "tproduct",
    "unfreeze",
    "unmerge",
]
