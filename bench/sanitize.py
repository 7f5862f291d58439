"""One training step of small layers by every backend that works on the GPU, for compute-sanitizer to watch.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1: allocations of their own, or an access beyond a tensor would fall into the
allocator's pool unseen.
"""

from __future__ import annotations

import torch

from tcurlora_ext.bench.cases import Case, Layer, of_layer
from tcurlora_ext.bench.networks import build
from tcurlora_ext.bench.reference import Reference
from tcurlora_ext.bench.variants import prepare, variants

# Ragged in every size; ranks with kernels of their own and without; one tile of groups and several.
CASES = [
    of_layer(Layer(f"{s} slices", 72, 56, n, s), 67, rank=r, dtype=dtype, compiled=False)
    for r in (1, 2, 3, 8, 16)
    for s, n in ((1, 1), (12, 3))
    for dtype in ("float32", "bfloat16")
]
# The other forms have no kernels of this project's.
NAMES = ("tcur native", "tcur triton")


def step(case: Case, device: torch.device) -> None:
    """A training step by every backend with kernels; RuntimeError where a result is wrong."""
    network = build(case, device)
    reference = Reference()
    for variant in variants(device):
        if variant.name in NAMES:
            problem = prepare(variant, case, network)
            reference.check(problem)
            problem.step()


def main() -> None:
    device = torch.device("cuda")
    for case in CASES:
        step(case, device)
    torch.cuda.synchronize()
    found = [variant.name for variant in variants(device) if variant.name in NAMES]
    print(f"{len(CASES)} layers by {', '.join(found)}: right")


if __name__ == "__main__":
    main()
