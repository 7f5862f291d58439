"""One training step of small layers by every backend that works on the GPU, for compute-sanitizer to watch."""

from __future__ import annotations

import os

# Allocations of their own, or an access beyond a tensor would fall into the allocator's pool unseen.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from tcurlora_ext.bench.cases import Layer
from tcurlora_ext.bench.variants import Inputs, check, trained, variants

# Ragged in every size; ranks with kernels of their own and without; one tile of groups and several.
LAYERS = [Layer(f"rank {r}, {s} slices", 72, 56, n, s, r, 67) for r in (1, 2, 3, 8, 16) for s, n in ((1, 1), (12, 3))]


def main() -> None:
    device = torch.device("cuda")
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = Inputs.random(layer, dtype, device)
            for name, forward in variants(device).items():
                if not name.startswith("tcur"):
                    continue
                check(name, forward, inputs)
                torch.autograd.grad(forward(inputs), trained(name, inputs), inputs.g)
    torch.cuda.synchronize()
    print(f"{len(LAYERS)} layers by {', '.join(n for n in variants(device) if n.startswith('tcur'))}: right")


if __name__ == "__main__":
    main()
