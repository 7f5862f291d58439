"""Small tensor files: a description and the small tensors of a safetensors file, compressed in one tensor of it.

safetensors takes about 100 bytes of text for each tensor, and a description as JSON repeats its keys and names. For
directions in a few bits that is a third of the file: 16.4 of 53.6 KB for 24 layers of width 128 at rank 8. Packed, the
same content takes 39.6 KB.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

PACKED = "packed"  # the tensor's name, and what the description's place in the header says
SMALL = 4096  # bytes; of a larger tensor the entry in the header is no more than 3 %
_MARK = json.dumps({"format": PACKED})
_LIMIT = 2**28  # bytes of one compressed part: a description takes about a kilobyte a layer
# What taking damaged bytes apart raises.
DAMAGE = (zlib.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def pack(tensors: Mapping[str, Tensor], key: str, description: str) -> bytes:
    """The bytes of a safetensors file whose description and small tensors are packed.

    Args:
        tensors: By name, contiguous and on the CPU.
        key: The entry of the header that has the description.
        description: As JSON, in one line.
    """
    small = {name: tensor for name, tensor in tensors.items() if tensor.nbytes < SMALL}
    index = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in small.items()]
    text = f"{description}\n{json.dumps(index, separators=(',', ':'))}".encode()
    content = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in small.values())
    packed = bytearray(zlib.compress(text, 9) + zlib.compress(content, 9))
    large = {name: tensor for name, tensor in tensors.items() if name not in small}
    return safetensors.torch.save({**large, PACKED: torch.frombuffer(packed, dtype=torch.uint8)}, {key: _MARK})


def unpack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors that :func:`pack` was given; those of another file as they are.

    Raises:
        One of :data:`DAMAGE`: The bytes are damaged.
    """
    marked = [key for key, value in metadata.items() if value == _MARK]
    if PACKED not in tensors or not marked:
        return dict(metadata), dict(tensors)
    text, rest = _decompressed(tensors[PACKED].numpy().tobytes())
    content, rest = _decompressed(rest)
    description, _, index = text.decode().partition("\n")
    entries = [(str(name), _dtype(dtype), tuple(map(int, shape))) for name, dtype, shape in json.loads(index)]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in entries]
    if rest or sum(sizes) != len(content):
        raise ValueError(f"found {len(content)} packed bytes and {len(rest)} more, expected {sum(sizes)}")
    found, at = {name: tensor for name, tensor in tensors.items() if name != PACKED}, 0
    for (name, dtype, shape), size in zip(entries, sizes, strict=True):
        part = bytearray(content[at : at + size])
        found[name] = torch.frombuffer(part, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        at += size
    return {**metadata, marked[0]: description}, found


def _decompressed(data: bytes) -> tuple[bytes, bytes]:
    """A compressed part, and what follows it."""
    stream = zlib.decompressobj()
    part = stream.decompress(data, _LIMIT)
    if not stream.eof:
        raise ValueError(f"found a packed part that is cut off or longer than {_LIMIT} bytes")
    return part, stream.unused_data


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"found {name}, expected a dtype")
    return found
