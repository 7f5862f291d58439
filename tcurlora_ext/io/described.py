"""safetensors files with a description as JSON in their header, and a digest by which damage shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def description(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A file's description as JSON, with the digest of all of the file as its last entry."""
    return json.dumps({**header, "digest": digest(header, tensors)})


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of name, dtype, shape and bytes of the tensors, as hexadecimal digits."""
    found = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
