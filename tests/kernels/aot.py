"""Compiles kernels for a GPU that need not be there, and reads what came out. Not for a process that interprets Triton."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tcurlora_ext.kernels.launch import Launch, TensorDescriptor

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Compiled:
    """What a compiled kernel uses of one program's share, and the matrix instructions in it."""

    registers: int
    stack: int
    local: list[str]  # instructions that load from or store to local memory
    shared: int  # bytes, static and dynamic
    matrix: dict[str, int] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)  # transpositions of a value that comes from a dot


def source_of(launch: Launch) -> Any:
    """What Triton would compile for this launch: the types and the divisibility of its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value, specialise = launch.arguments[name], not parameter.do_not_specialize
        divisible = False
        if value is None or (type(value) is int and value == 1 and specialise):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            divisible = specialise and value % 16 == 0
        else:
            assert isinstance(value, TensorDescriptor), f"{name} is {type(value)}"
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile for ``capability`` (80, 90) and look into the result."""
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source_of(launch), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _dump("-res-usage", file.name)
        sass = _dump("-sass", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    assert operations, "no instruction found in the disassembly"
    matrix: dict[str, int] = {}
    for operation in operations:
        name = operation.split(".")[0]
        if name in ("HGMMA", "HMMA"):
            matrix[name] = matrix.get(name, 0) + 1
    return Compiled(
        used["REG"], used["STACK"], [o for o in operations if o.split(".")[0] in ("LDL", "STL")],
        used["SHARED"] + kernel.metadata.shared, matrix,
        transposed_dots(kernel.asm["ttir"]) + transposed_dots(kernel.asm["ttgir"]),
    )  # fmt: skip


def _dump(option: str, cubin: str) -> str:
    return subprocess.run([str(CUOBJDUMP), option, cubin], check=True, capture_output=True, text=True).stdout


DOTS = ("tt.dot", "ttng.warp_group_dot")
TRANSPOSITIONS = ("tt.trans", "ttg.memdesc_trans")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULTS = re.compile(r"^(%[\w$.-]+)(?::(\d+))?\s*=\s*(.*)$")


class _Flow:
    """Which values of a module's text reach which others, through loops, branches and shared memory.

    Names are scoped: two regions beside each other may use the same ones, so every definition gets a number.
    """

    def __init__(self, module: str) -> None:
        self.edges: dict[str, set[str]] = {}
        self.dots: list[str] = []
        self.transpositions: list[tuple[str, str]] = []  # operand, line
        self._transposed = re.findall(r"^(#\w+) = #ttg\.\w+<\{.*transposed = true", module, re.MULTILINE)
        self._scopes: list[dict[str, str]] = [{}]
        self._defined = 0
        # Of the open regions: the results of their operation and the arguments of their body.
        self._regions: list[tuple[list[str], list[str]]] = []
        for line in map(str.strip, module.splitlines()):
            self._read(line)

    def _read(self, line: str) -> None:
        if line.startswith("}"):
            self._scopes.pop()
            kept = self._regions.pop()
            if line.split(" loc(")[0].endswith("{"):  # } else {
                self._regions.append(kept)
                self._scopes.append({})
            return
        found = _RESULTS.match(line)
        base, count, text = found.groups() if found else ("", None, line)
        name = re.split(r"[\s(]", text.strip('"'), maxsplit=1)[0].strip('"')
        if name == "scf.while":
            raise AssertionError(f"a loop that this reading of the module does not follow: {line}")
        opens = text.endswith("{")
        starts = re.search(r"iter_args\((.*?)\) ->", text) if name == "scf.for" else None
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", starts[1]) if starts else []
        operands = self._uses(text)
        initial = [self._use(value) for _, value in pairs]
        results = self._define([base] if not count else [f"{base}#{i}" for i in range(int(count))]) if found else []
        if opens:
            self._scopes.append({})
            arguments = self._define([argument for argument, _ in pairs])
            self._regions.append((results, arguments))
            for value, argument, result in zip(initial, arguments, results, strict=bool(pairs)):
                self._edge(value, argument, result)
        elif name == "scf.yield":
            outer, arguments = self._regions[-1]
            for i, value in enumerate(operands):
                self._edge(value, *outer[i : i + 1], *arguments[i : i + 1])
        elif found:
            self._operation(name, text, operands, results)
        elif "local_store" in name or "async_copy" in name:
            self._edge(operands[0], *operands[1:])

    def _use(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _uses(self, text: str) -> list[str]:
        return [self._use(name) for name in _VALUE.findall(text)]

    def _define(self, names: list[str]) -> list[str]:
        for name in names:
            self._defined += 1
            self._scopes[-1][name] = f"{name}@{self._defined}"
        return [self._scopes[-1][name] for name in names]

    def _edge(self, source: str, *targets: str) -> None:
        self.edges.setdefault(source, set()).update(targets)

    def _operation(self, name: str, text: str, operands: list[str], results: list[str]) -> None:
        for operand in operands:
            self._edge(operand, *results)
            if "memdesc" in name:  # a view: what is stored through it is in what it views
                for result in results:
                    self._edge(result, operand)
        if name in DOTS:
            self.dots += results
        laid_out = name == "ttg.local_alloc" and any(f"{layout}," in text for layout in self._transposed)
        if laid_out or name in TRANSPOSITIONS:
            self.transpositions += [(operand, text) for operand in operands]

    def from_dots(self) -> set[str]:
        reached: set[str] = set()
        waiting = list(self.dots)
        while waiting:
            value = waiting.pop()
            if value not in reached:
                reached.add(value)
                waiting += self.edges.get(value, ())
        return reached


def transposed_dots(module: str) -> list[str]:
    """Transpositions whose operand comes, through any operations, from the result of a dot.

    ``module`` is the text of Triton's own or its GPU dialect. A copy into shared memory in a transposed layout counts.
    """
    flow = _Flow(module)
    assert "tt.dot" not in module or flow.dots, "a dot was not recognised"
    reached = flow.from_dots()
    return [line for operand, line in flow.transpositions if operand in reached]


def compile_all(launches: list[tuple[str, Launch, int]], workers: int) -> dict[str, Compiled]:
    raise NotImplementedError(json.dumps(len(launches)))
