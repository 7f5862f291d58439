"""Compiles kernels for a GPU, without having one, and analyses the result. Run as ``aot.py PART PARTS NAME...``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from cases import DTYPES, RIDING, Spec, specs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tcurlora_ext.kernels import launch
from tcurlora_ext.kernels.launch import Launch, TensorDescriptor
from tcurlora_ext.kernels.middle import Middle
from tcurlora_ext.kernels.riding import launch as riding

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Compiled:
    """The registers and memory that one program of a compiled kernel uses, and its matrix instructions."""

    registers: int
    stack: int
    local: list[str]  # instructions that load from or store to local memory
    shared: int  # bytes, static and dynamic
    matrix: dict[str, int] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)  # transpositions of a value that comes from a dot


def source_of(one: Launch) -> Any:
    """The source that Triton compiles for this launch, with the types and the divisibility of its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(one.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(one.kernel.params):
        name = parameter.name
        if name in one.constants:
            signature[name] = "constexpr"
            continue
        value, specialise = one.arguments[name], not parameter.do_not_specialize
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
    return ASTSource(one.kernel, signature, constants, attributes)


def compile_for(one: Launch, capability: int) -> Compiled:
    """Compile for ``capability`` (80, 90) and analyse the result."""
    return _compile(source_of(one), capability, one.options)


def _compile(source: Any, capability: int, options: dict[str, Any]) -> Compiled:
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
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

    Names are scoped: two regions may use the same name, so every definition gets a number.
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
    """The transpositions whose operand depends, through any operations, on the result of a dot.

    ``module`` is the text in Triton's own dialect or in its GPU dialect. A copy into shared memory
    in a transposed layout counts as a transposition.
    """
    flow = _Flow(module)
    assert "tt.dot" not in module or flow.dots, "a dot was not recognised"
    reached = flow.from_dots()
    return [line for operand, line in flow.transpositions if operand in reached]


def launches_of(spec: Spec) -> list[Launch]:
    """The launches of a case, as the operator makes them, on tensors without memory."""
    if spec.kernel in RIDING:
        return riding_launches_of(spec)
    dtype, n = DTYPES[spec.dtype], spec.n
    one_tile = spec.kernel in ("fused", "fused_back")
    slices = spec.whole if one_tile else spec.S
    middle = Middle.of(torch.zeros(slices, spec.c, spec.r), 0, n, 0.5, spec.transform)
    middle = replace(middle, core=middle.core.to("meta"), phases=middle.phases.to("meta"))

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def padded(*shape: int) -> torch.Tensor:
        return new(*shape[:-1], -(-shape[-1] // 8) * 8)[..., : shape[-1]]

    x, weight, bias = new(spec.T, spec.in_), new(n * spec.out, spec.in_), new(n * spec.out)
    col, row, h = new(spec.out, spec.c * slices), new(spec.r * slices, spec.in_), new(spec.T, spec.r * slices)
    m, dh, y, dx = padded(n, spec.T, spec.c * slices), padded(spec.T, spec.r * slices), new(spec.T, n * spec.out), x
    config, how = spec.config, (spec.precision, spec.descriptors)
    if spec.kernel == "project":
        return [launch.project_launch(x, row, middle, h, m, config, *how)]
    if spec.kernel == "project_back":
        return [launch.project_back_launch(y, col, middle, m, dh, config, *how)]
    if spec.kernel == "expand":
        return [launch.expand_launch(x, weight, m, col, bias, y, n, False, config, *how, 132)]
    if spec.kernel == "expand_back":
        return [launch.expand_launch(y, weight, dh, row, None, dx, 1, True, config, *how, 132)]
    if spec.kernel == "fused":
        return [launch.fused_launch(x, weight, bias, row, col, middle, h, y, config, *how)]
    if spec.kernel == "fused_back":
        return [launch.fused_back_launch(y, weight, row, col, middle, m, dx, config, *how)]
    sums = launch.core_gradient_workspace(middle, spec.T, config)
    workspace = torch.empty(sums, dtype=torch.float32, device="meta")
    return list(launch.core_gradient_launches(m, h, middle, workspace, middle.core, config, spec.precision))


def riding_launches_of(spec: Spec) -> list[Launch]:
    """``ride``; or ``ride_back`` with and without dh stored, without x's gradient, and the sum of the chunks."""
    dtype, config, how = DTYPES[spec.dtype], spec.config, spec.precision

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, h = new(spec.T, spec.in_), new(spec.T, spec.r)
    core = new(spec.S, spec.c, spec.r, dtype=torch.float32)
    operands: dict[str, Any] = {
        "row": new(spec.r * spec.S, spec.in_), "columns": new(spec.c, dtype=torch.int64), "core": core,
        "gain": new(spec.c, dtype=torch.float32), "slice_index": 1, "scale": 0.5,
    }  # fmt: skip
    if spec.kernel == "ride":
        return [riding.ride_launch(x, **operands, changed=x, h=h, config=config, precision=how)]
    sums = new(*riding.workspace_shape(core, spec.T, config), dtype=torch.float32)
    given: dict[str, Any] = {**operands, "h": h, "workspace": sums, "config": config, "precision": how}
    p = new(spec.T, spec.c)
    return [
        riding.ride_back_launch(x, **given, dh=None, needs_x=True),
        riding.ride_back_launch(x, **given, dh=h, needs_x=True),
        riding.ride_back_launch(p, **given, dh=None, needs_x=False),
        riding.reduce_launch(sums, operands["gain"], 1, 0.5, core),
    ]


def main(part: int, parts: int, names: list[str]) -> None:
    """Compile every ``parts``-th of the cases with these names and print a line of JSON for each."""
    for spec in [spec for spec in specs() if spec.name in names][part::parts]:
        compiled = [asdict(compile_for(one, spec.capability)) for one in launches_of(spec)]
        print(json.dumps({"name": spec.name, "compiled": compiled}), flush=True)
    if part == 0:
        for name, kernel in (("transposed", transposed_result), ("spilling", spilling)):
            signature = {"x": "*bf16", "y": "*bf16"}
            source = ASTSource(kernel, signature, {}, {(0,): ALIGNED, (1,): ALIGNED})
            compiled = [asdict(_compile(source, 90, {"num_warps": 4, "num_stages": 1}))]
            print(json.dumps({"name": name, "compiled": compiled}), flush=True)


ALIGNED = [["tt.divisibility", 16]]


@triton.jit
def transposed_result(x, y):
    """A product with the transpose of a product, which no kernel may contain."""
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    a = tl.load(x + at)
    product = tl.dot(a, a).to(tl.bfloat16)
    tl.store(y + at, tl.dot(tl.trans(product), a).to(tl.bfloat16))


@triton.jit
def spilling(x, y):
    """An accumulator of 256 x 256 elements in the registers of 128 threads."""
    i = tl.arange(0, 256)
    k = tl.arange(0, 16)
    a = tl.load(x + i[:, None] * 16 + k[None, :])
    b = tl.load(x + k[:, None] * 256 + i[None, :])
    tl.store(y + i[:, None] * 256 + i[None, :], tl.dot(a, b).to(tl.bfloat16))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
