"""Named ranges around the stages of the operator, so that a profile reads like the maths.

Nsight Systems and Nsight Compute see them as NVTX ranges in the domain "tcurlora" (package ``nvtx``; without it there
are none), ``torch.profiler`` as user annotations. csrc/trace.h gives the stages in C++ the same names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "tcurlora"


def stage(name: str) -> AbstractContextManager[Any]:
    """A range over what is launched inside; nothing where neither profiler is there."""
    profiled = torch._C._autograd._profiler_enabled()
    if nvtx is None:
        return torch.profiler.record_function(name) if profiled else nullcontext()
    annotation = nvtx.annotate(name, domain=DOMAIN)
    if not profiled:
        return annotation
    both = ExitStack()
    both.enter_context(annotation)
    both.enter_context(torch.profiler.record_function(name))
    return both
