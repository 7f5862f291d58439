"""Loads thousands of damaged adapter files: each is refused, or it gives the output of the whole file.

    python tests/soak/fuzz_files.py 10000 0        # number of files, seed

A file that `tcur.load_adapter` takes must give the output of the undamaged file, bit for bit. Any other file must raise
a ValueError that names it, and leave the model as it was, bit for bit. Everything else is a failure: another exception,
another output, a changed model, more than 20 s. The first failures are printed; the exit code is 1 where there are any.

Where the description or a tensor is changed, every second file loses its digest too, as if it came from a version that
wrote none. Changed values are then valid values: another output is counted apart, and is no failure.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import runpy
import signal
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.packed import unpack

Network: Callable[..., nn.Module] = runpy.run_path(str(Path(__file__).parents[1] / "adapter" / "conftest.py"))[
    "Network"
]

SECONDS = 20  # loading takes milliseconds
SHOWN = 10
PLAIN = "other output without digest"
WITHOUT_DIGEST = ", without digest"
OUTCOMES = ("refused", "same output", PLAIN, "other output", "other error", "unnamed file", "changed model", "hang")
FAILURES = OUTCOMES[3:]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"rank": (3, 2), "transform": "dct"},
    {"trainable": "all"},
    {"frequencies": 2},
    {"core_domain": "slice", "stack_by": "none"},
    {"factors": "learned"},  # whose file is packed
]


class Hang(BaseException):
    """Loading took too long. No Exception, so that no handler of the library can take it."""


# Mutations of bytes


def flip_bits(content: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flip_bits_of_the_header(content: bytearray, draw: random.Random) -> bytes:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(content)


def cut(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def remove_bytes(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    del content[start : start + draw.randint(1, 64)]
    return bytes(content)


def insert_bytes(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randint(0, len(content))
    content[start:start] = draw.randbytes(draw.randint(1, 64))
    return bytes(content)


def overwrite_bytes(content: bytearray, draw: random.Random) -> bytes:
    """As a disk does that returns a block of zeros or of another file."""
    length = draw.randint(1, 512)
    start = draw.randrange(max(1, len(content) - length))
    content[start : start + length] = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
    return bytes(content)


# Mutations of the description


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value together with each of its keys or indices."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def change_value_of_the_header(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    container, key = draw.choice(_places(header))
    container[key] = draw.choice([
        None, True, False, 0, 1, -1, 3, 2**40, 10**400, 0.5, -1e300, float("nan"), float("inf"), "", "x", "float16",
        [], [0], [[]], {}, {"x": 1}, "blocks.0.mlp.linear1", ["blocks.0.mlp.linear1"] * 2,
    ])  # fmt: skip


def remove_entry_of_the_header(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    container, key = draw.choice(_places(header))
    del container[key]


def rename_entry_of_the_header(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    container, key = draw.choice([place for place in _places(header) if isinstance(place[0], dict)])
    container[draw.choice(["x", "", "rank", *container])] = container.pop(key)


def swap_entries_of_the_header(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    (one, key), (other, twin) = draw.sample(_places(header), 2)
    one[key], other[twin] = copy.deepcopy(other[twin]), copy.deepcopy(one[key])


# Mutations of the tensors


def _pick(tensors: dict[str, Tensor], draw: random.Random) -> str:
    return draw.choice(list(tensors))


def rename_tensor(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name, other = _pick(tensors, draw), _pick(tensors, draw)
    new = draw.choice(["x", "core", "trained.x", "state.x", name + "x", "trained." + name, other, "col.16x8"])
    tensors[new] = tensors.pop(name).clone()


def remove_tensor(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    del tensors[_pick(tensors, draw)]


def reshape_tensor(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = _pick(tensors, draw)
    t = tensors[name]
    shapes = [t.flatten(), t[None], t[..., None]]
    if t.dim():
        shapes += [t.movedim(0, -1), t.reshape(-1, t.shape[0]), t[:0], t[:1], t[:-1], torch.cat([t, t]), t.sum()]
    tensors[name] = draw.choice(shapes).contiguous().clone()


def change_dtype(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = _pick(tensors, draw)
    tensors[name] = tensors[name].to(draw.choice([
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
        torch.uint8, torch.bool, torch.complex64,
    ]))  # fmt: skip


def change_values(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = _pick(tensors, draw)
    changed = tensors[name].clone().flatten()
    places = [draw.randrange(changed.numel())] if draw.random() < 0.7 else slice(None)
    if changed.is_floating_point():
        changed[places] = draw.choice([0.0, 1.0, 1e-45, 3e38, float("nan"), float("inf"), -float("inf"), draw.random()])
    elif changed.dtype == torch.uint8:
        changed[places] = draw.randrange(256)
    else:
        changed[places] = draw.choice([0, 1, -1, 7, 8, 2**31, 2**62, -(2**63)])
    tensors[name] = changed.view(tensors[name].shape)


def swap_tensors(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    one, other = _pick(tensors, draw), _pick(tensors, draw)
    tensors[one], tensors[other] = tensors[other], tensors[one]


OF_BYTES = [flip_bits, flip_bits_of_the_header, cut, remove_bytes, insert_bytes, overwrite_bytes]
OF_PARTS = [
    change_value_of_the_header, remove_entry_of_the_header, rename_entry_of_the_header, swap_entries_of_the_header,
    rename_tensor, remove_tensor, reshape_tensor, change_dtype, change_values, swap_tensors,
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The name of a mutation, and what it makes of a file."""
    number = draw.randrange(len(OF_BYTES) + len(OF_PARTS))
    if number < len(OF_BYTES):
        of_bytes = OF_BYTES[number]
        return of_bytes.__name__, of_bytes(bytearray(content), draw)
    of_parts, name = OF_PARTS[number - len(OF_BYTES)], ""
    (length,) = struct.unpack("<Q", content[:8])
    metadata, tensors = unpack(json.loads(content[8 : 8 + length])["__metadata__"], load(content))
    header = json.loads(metadata["tcurlora"])
    if draw.random() < 0.5:
        header.pop("digest", None)
        name = WITHOUT_DIGEST
    of_parts(header, tensors, draw)
    return of_parts.__name__ + name, safetensors.torch.save(tensors, {"tcurlora": json.dumps(header)})


# The trial


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that loading can change: kinds of modules, and the bits and flags of parameters and buffers."""
    state: dict[str, Any] = {f"module {name}": type(module) for name, module in model.named_modules()}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (t.dtype, t.shape, t.requires_grad, t.detach().numpy().tobytes())
    return state


def _subspace(model: nn.Module, config: tcur.TCURConfig) -> tcur.Subspace:
    x = torch.linspace(-2, 2, 2 * 5 * 6).view(2, 5, 6).sin()
    return tcur.learn_factors(model, config, lambda network: network(x).square().mean(), 2)


class Target:
    """An adapter file, the models that it is loaded onto, and the output that it gives."""

    def __init__(self, options: dict[str, Any], x: Tensor, folder: Path) -> None:
        base = Network().eval()
        adapted = self._train(copy.deepcopy(base), options)
        self.content = tcur.save_adapter(adapted, folder / "whole.safetensors").read_bytes()
        self.x = x
        self.models = [base, self._train(copy.deepcopy(base), options)]
        self.expected = self.output(tcur.load_adapter(copy.deepcopy(base), folder / "whole.safetensors"))
        assert self.expected == self.output(adapted) != self.output(base)

    @staticmethod
    def _train(model: nn.Module, options: dict[str, Any]) -> nn.Module:
        config = tcur.TCURConfig(**{"rank": 2} | options)
        subspace = None if config.factors == "weights" else _subspace(model, config)
        tcur.inject(model, config, subspace=subspace)
        tcur.unfreeze(model, ["head", "norm"])
        with torch.no_grad():
            for stack in tcur.stacks(model).values():
                stack.core.normal_(0, 0.3)
            for parameter in model.head.parameters():  # type: ignore[union-attr]
                parameter.normal_()
        return model

    def output(self, model: nn.Module) -> bytes:
        with torch.no_grad():
            return model(self.x).numpy().tobytes()

    def outcome(self, path: Path, model: nn.Module, before: dict[str, Any]) -> tuple[str, str]:
        """One of OUTCOMES, and what to say about it."""
        signal.alarm(SECONDS)
        try:
            tcur.load_adapter(model, path)
            output = self.output(model)
        except ValueError as error:
            signal.alarm(0)
            if state_of(model) != before:
                return "changed model", str(error)
            return "refused" if str(path) in str(error) else "unnamed file", str(error)
        except Hang:
            return "hang", ""
        except Exception as error:
            return "other error", repr(error)
        finally:
            signal.alarm(0)
        return ("same output" if output == self.expected else "other output"), ""


def trial(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and a line for each of the first failures."""
    torch.manual_seed(seed)
    draw, x = random.Random(seed), torch.randn(2, 5, 6)
    targets = [Target(options, x, folder) for options in CONFIGS]
    path, outcomes, lines = folder / "mutated.safetensors", Counter[str](), []
    models: dict[tuple[int, int], tuple[nn.Module, dict[str, Any]]] = {}
    for number in range(count):
        place = number % len(targets), draw.randrange(2)
        target = targets[place[0]]
        if place not in models:  # loading succeeded or failed badly: a new copy
            model = copy.deepcopy(target.models[place[1]])
            models[place] = model, state_of(model)
        name, content = mutated(target.content, draw)
        path.write_bytes(content)
        outcome, message = target.outcome(path, *models[place])
        if outcome == "other output" and name.endswith(WITHOUT_DIGEST):
            outcome = PLAIN
        outcomes[outcome] += 1
        if outcome != "refused":
            del models[place]
        if outcome in FAILURES:
            onto = ("plain", "adapted")[place[1]]
            lines.append(f"file {number} ({name}, {CONFIGS[place[0]]}, {onto} model): {outcome} {message}")
    return outcomes, lines


def _raise_hang(*_: object) -> None:
    raise Hang


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="N", help="how many damaged files")
    parser.add_argument("seed", type=int, metavar="SEED")
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGALRM, _raise_hang)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes, lines = trial(options.count, options.seed, Path(folder))
    finally:
        signal.signal(signal.SIGALRM, before)
    print(*lines[:SHOWN], sep="\n", end="\n" if lines else "")
    print(f"{options.count} files: " + ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES))
    return int(any(outcomes[name] for name in FAILURES))


if __name__ == "__main__":
    faulthandler.enable()  # a crash shows where
    raise SystemExit(main())
