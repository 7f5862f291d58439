"""Named ranges around the stages of the operator, so that a profile reads like the maths.

Nsight Systems and Nsight Compute show them as NVTX ranges in the domain "tcurlora", if the package ``nvtx`` is
installed. ``torch.profiler`` shows them as user annotations. csrc/trace.h names the stages in C++ in the same way.
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
    """A context manager that names what runs inside it; without effect where no profiler is active or installed."""
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
