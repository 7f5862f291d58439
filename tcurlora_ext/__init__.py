"""tCURLoRA: adapt frozen networks by a tiny core U between columns and rows of their own weights."""

from .adapter.calibration import calibrate
from .adapter.config import TCURConfig
from .adapter.files import save_adapter
from .adapter.inject import inject, remove, stacks, unfreeze
from .adapter.linear import TCURLinear
from .adapter.load import load_adapter
from .adapter.merge import merge, unmerge
from .adapter.plain import plain_copy
from .adapter.sharding import shard
from .adapter.stack import TCURStack
from .adapter.summary import summary
from .maths import reference, tproduct
from .operator import functional
from .operator.backends import backends

__all__ = [
    "TCURConfig",
    "TCURLinear",
    "TCURStack",
    "backends",
    "calibrate",
    "functional",
    "inject",
    "load_adapter",
    "merge",
    "plain_copy",
    "reference",
    "remove",
    "save_adapter",
    "shard",
    "stacks",
    "summary",
    "tproduct",
    "unfreeze",
    "unmerge",
]
