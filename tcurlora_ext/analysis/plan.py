"""The cost of an adapter, counted from shapes alone: also for a model on the meta device, before weights are loaded.

FLOPs are those of matrix products: a product (a, b)(b, c) counts 2abc. Bytes saved for backward are those that adapted
layers add: a frozen linear layer saves nothing but a reference to W for its dx. With ``dropout`` the adapter always
saves h and a mask as large as x, counted in the dtype of x, as on the CPU (CUDA takes one byte per element). LoRA is
PEFT's form with one adapter per module (also per fused projection), without dropout, in the dtype of the activations.

For T tokens, n slices of (out, in) in the layer, S slices in the stack, q = r*S, q_c = c*S, ``pairs`` frequencies with
a real and an imaginary part, and ``single`` frequencies that are real:

    tCUR forward   h = x row^T 2T*q*in,  middle 2T*n*c*r*(single + 4 pairs),  m col^T 2T*n*q_c*out
    tCUR backward  p = g col,  dh: a middle product,  dh row,  dcore: a middle product; h again where x was saved
    LoRA forward   2T*r0*(in + n*out);  backward twice that
    base           2T*n*in*out forward, the same for dx

Where every slice has a core of its own, the adapter rides on the base product, with one core (c, r) per slice:

    riding forward   h = x R^T 2T*n*r*in,  h U^T 2T*n*c*r
    riding backward  dcore and p U 2T*n*c*r each,  (p U) R 2T*n*r*in

A convolution is counted as the product of its weight's matrix (out, in*k^d) with T voxels of the output, a transposed
one as (out*k^d, in) with T voxels of the input (docs/convolutions.md). Its adapter never rides. Given T alone, x has
stride^d times as many voxels. LoRA of a transposed convolution, which PEFT does not have, is counted in the same way.
PyTorch's frozen convolution itself saves x, which an adapted one does not; the bytes of LoRA include that x.

With ``frequencies``, S in these formulas is the number of kept blocks, and a layer of n slices takes n calls of one
slice each.

Materialising dW of a layer costs 2q*in*out for any T, which is fewer forward FLOPs than those of the adapter above
``crossover`` = in*out / (in + out) tokens. Its cost in memory and rounding is not counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.convolutions import elements_before, positions
from tcurlora_ext.adapter.model.coverage import Coverage, coverage
from tcurlora_ext.adapter.model.parameters import reader_of
from tcurlora_ext.adapter.model.ranks import stack_ranks
from tcurlora_ext.adapter.model.structure import refuse_adapted
from tcurlora_ext.adapter.model.support import is_convolution
from tcurlora_ext.adapter.model.targets import Target, find_targets, group, watching
from tcurlora_ext.adapter.options import WEIGHTS, positive
from tcurlora_ext.io.table import folded, text_table
from tcurlora_ext.maths.coding import BITS, CODED_BITS

from .filesize import file_bytes, stack_file_bytes
from .layercost import ConvolutionCost, LayerCost, LayerSizes, RidingCost, layer_cost
from .learned import LearnedPlan, plan_learned

# Projections that usually have the same tensor as input: autograd saves it once for all of them.
_SIBLINGS = re.compile(r"(?:(?P<attention>(to_)?[qkv](_proj)?|query|key|value)|(?P<gated>gate_proj|up_proj))")


@dataclass(frozen=True)
class Call:
    """How a forward pass calls a layer.

    Attributes:
        tokens: The number of rows of x over all calls of the layer.
        source: Identifies the input: layers with equal ``source`` have the same tensor as input.
        elements: The number of elements of a convolution's input; 0 for a linear layer.
    """

    tokens: int
    source: object
    elements: int = 0


@dataclass(frozen=True)
class Cost:
    """The cost of one method on some layers.

    Attributes:
        trained: The number of trained parameters.
        forward: FLOPs in forward, without the base's products.
        backward: FLOPs in backward, without the base's products.
        saved: Bytes saved from forward to backward.
        factors: Bytes of frozen factors that are held: col and row, or row alone where the adapter rides.
        file: Bytes that these layers take in the adapter file.
    """

    trained: int = 0
    forward: int = 0
    backward: int = 0
    saved: int = 0
    factors: int = 0
    file: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StackPlan:
    """The plan for one stack.

    Attributes:
        name: The stack's name.
        layers: The number of modules.
        slices: S, the number of slices.
        shape: (out, in) of a slice.
        rank: (c, r).
        q: The width of h.
        tokens: The sum of the tokens of all layers.
        crossover: The tokens per layer above which materialising dW takes fewer forward FLOPs.
        base: FLOPs of the frozen layers.
        tcur: The cost of the adapter.
        lora: The cost of LoRA in the same modules.
    """

    name: str
    layers: int
    slices: int
    shape: tuple[int, int]
    rank: tuple[int, int]
    q: int
    tokens: int
    crossover: float
    base: Cost
    tcur: Cost
    lora: Cost


@dataclass(frozen=True)
class Plan:
    """The plans of all stacks and their totals. ``str()`` formats them as a table, :meth:`rows` as records.

    ``covers`` says which of the model's weights are adapted, and why the others are not. ``learned`` is the plan of
    learned factors; None where they are columns and rows of the weights.
    """

    stacks: tuple[StackPlan, ...]
    base: Cost
    tcur: Cost
    lora: Cost
    lora_rank: int
    dtype: str
    covers: Coverage
    learned: LearnedPlan | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One record per stack and method, then one per method for all stacks, whose ``stack`` is "total".

        The values are numbers and strings.
        """
        records = []
        for stack in self.stacks:
            out_features, in_features = stack.shape
            about = {
                "stack": stack.name, "layers": stack.layers, "slices": stack.slices, "out": out_features,
                "in": in_features, "tokens": stack.tokens, "crossover": stack.crossover,
            }  # fmt: skip
            columns, rows = stack.rank
            for method, rank, q, cost in (
                ("base", "", 0, stack.base),
                ("tcur", f"{columns},{rows}", stack.q, stack.tcur),
                ("lora", str(self.lora_rank), self.lora_rank, stack.lora),
            ):
                records.append(about | {"method": method, "rank": rank, "q": q} | asdict(cost))
        total = {
            "stack": "total", "layers": sum(s.layers for s in self.stacks),
            "slices": sum(s.slices for s in self.stacks), "out": "", "in": "",
            "tokens": sum(s.tokens for s in self.stacks), "crossover": "",
        }  # fmt: skip
        for method, cost in (("base", self.base), ("tcur", self.tcur), ("lora", self.lora)):
            records.append(total | {"method": method, "rank": "", "q": ""} | asdict(cost))
        return records

    def brief(self) -> list[list[str]]:
        """A line of headings, then one line per record, in at most 80 columns; FLOPs are those of base and adapter.

        A long name goes on in the lines of its stack.
        """
        lines = [["stack", "form", "trained", "GFLOP", "of base", "saved MiB", "file KiB"]]
        frozen = 0.0
        for row in self.rows():
            base, flops = row["method"] == "base", row["forward"] + row["backward"]
            frozen = flops if base else frozen
            total = flops if base else frozen + flops
            rank = row["rank"] or {"tcur": self._shared_rank(), "lora": str(self.lora_rank)}.get(row["method"], "")
            rank = ",".join(dict.fromkeys(rank.split(",")))  # one number where c = r
            form = {"base": "frozen", "tcur": f"tCUR r={rank}", "lora": f"LoRA r={rank}"}[row["method"]]
            cells = ["", "", ""] if base else [
                f"{total / frozen:.3f}" if frozen else "", f"{row['saved'] / 2**20:,.2f}", f"{row['file'] / 1024:,.1f}",
            ]  # fmt: skip
            trained = "" if base else f"{row['trained']:,}"
            lines.append(
                [row["stack"] if base else "", form.removesuffix(" r="), trained, f"{total / 1e9:,.2f}", *cells]
            )
        columns = list(zip(*lines, strict=True))
        # On a terminal a column has up to two characters beside its text, and the table one more.
        width = max(14, 79 - 2 * len(columns) - sum(max(map(len, column)) for column in columns[1:]))
        for first in range(1, len(lines), 3):
            for line, part in zip(lines[first:], folded(lines[first][0], width, 3), strict=False):
                line[0] = part
        return lines

    def _shared_rank(self) -> str:
        """The rank of all stacks, where they have one."""
        ranks = {stack.rank for stack in self.stacks}
        return ",".join(map(str, ranks.pop())) if len(ranks) == 1 else ""

    def table(self) -> list[list[str]]:
        """A line of headings, then one line per record with all counts, formatted for reading."""
        lines = [
            ["stack", "layers", "slices", "out x in", "T > dW", "method", "rank", "q", "trained", "forward GFLOP",
             "backward GFLOP", "saved MiB", "factors MiB", "file KiB"]
        ]  # fmt: skip
        for index, row in enumerate(self.rows()):
            first = index % 3 == 0
            shape = f"{row['out']} x {row['in']}" if row["out"] else ""
            crossover = f"{row['crossover']:,.0f}" if row["crossover"] else ""
            about = [row["stack"], str(row["layers"]), str(row["slices"]), shape, crossover] if first else [""] * 5
            base = row["method"] == "base"
            memory = [f"{row[name] / 2**20:,.2f}" for name in ("saved", "factors")]
            lines.append([
                *about, row["method"], row["rank"].replace(",", ", "), str(row["q"] or ""),
                "" if base else f"{row['trained']:,}", f"{row['forward'] / 1e9:,.3f}", f"{row['backward'] / 1e9:,.3f}",
                *(["", "", ""] if base else [*memory, f"{row['file'] / 1024:,.1f}"]),
            ])  # fmt: skip
        return lines

    def __str__(self) -> str:
        header, *lines = self.table()
        return text_table(header, lines, left=(0, header.index("method")))


def plan(
    model: nn.Module,
    config: TCURConfig | None = None,
    tokens: int | Mapping[str, Call] = 2048,
    lora_rank: int = 8,
    dtype: torch.dtype | None = None,
    bits: int = CODED_BITS,
    parts: int = 4,
) -> Plan:
    """The cost of an adapter in one training step, and that of LoRA in the same modules for comparison.

    Args:
        model: The model, which is not changed and may be on the meta device.
        config: The adapter's configuration; None: ``TCURConfig()``.
        tokens: T, the rows of every layer's input, or the result of :func:`trace_calls`. For a number T, layers of one
            parent that are named as q, k and v, or as gate and up, count as layers with the same input.
        lora_rank: The rank of LoRA.
        dtype: The dtype of weights and activations; None: the weights'.
        bits: Where factors are learned, the bits of an entry of their directions.
        parts: In how many parts their warm-up may be, for the counts of its memory.

    Raises:
        ValueError: Nothing matches, the model is already adapted, a rank does not fit, or a layer was not called.
    """
    config = config or TCURConfig()
    if isinstance(tokens, int) and tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected a positive whole number")
    positive("parts", parts)
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
    if lora_rank < 1:
        raise ValueError(f"lora_rank is {lora_rank}, expected a positive whole number")
    refuse_adapted(model)
    groups = group(find_targets(model, config), config)
    ranks = stack_ranks(groups, config)
    kept: dict[str, set[object]] = {"tcur": set(), "lora": set()}
    stacks = []
    for name, members in groups.items():
        calls = [_call(target, tokens) for target in members]
        stacks.append(_stack(name, members, ranks[name], calls, config, lora_rank, dtype, kept))
    base, tcur, lora = (sum((getattr(s, kind) for s in stacks), Cost()) for kind in ("base", "tcur", "lora"))
    tcur = Cost(**(asdict(tcur) | {"file": file_bytes(config, groups, ranks, bits)}))
    learned = None if config.factors == WEIGHTS else plan_learned(config, groups, ranks, bits, parts)
    covers = coverage(model, config, {target.name: target.slices for members in groups.values() for target in members})
    found = dtype or next(iter(groups.values()))[0].weight.dtype
    return Plan(tuple(stacks), base, tcur, lora, lora_rank, str(found).removeprefix("torch."), covers, learned)


def trace_calls(model: nn.Module, config: TCURConfig, *inputs: Any, **keywords: Any) -> dict[str, Call]:
    """Run ``model(*inputs, **keywords)`` once and record for each target its number of tokens and its input tensor.

    On the meta device nothing is computed. A target that is not called is not in the result.
    """
    seen: dict[int, tuple[int, Tensor]] = {}  # keeps the tensors alive, so that no id is reused
    calls: dict[str, Call] = {}
    targets = {target.name: target for target in find_targets(model, config)}

    def note(name: str, x: Tensor) -> None:
        number, _ = seen.setdefault(id(x), (len(seen), x))
        module, before = targets[name].module, calls.get(name, Call(0, number))
        if is_convolution(module):
            calls[name] = Call(before.tokens + positions(module, x.shape), number, before.elements + x.numel())
        else:
            calls[name] = Call(before.tokens + x.shape[:-1].numel(), number)

    def note_read(name: str, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x, *others = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        experts = [] if isinstance(module, nn.MultiheadAttention) else [o for o in others if not o.is_floating_point()]
        tokens = experts[0].numel() if experts else x.shape[:-1].numel()  # a token has several experts
        calls[name] = Call((calls[name].tokens if name in calls else 0) + tokens, name)

    readers = {name: reader_of(model, name) for name in targets}
    handles = [
        reader.register_forward_pre_hook(partial(note_read, name), with_kwargs=True)
        for name, reader in readers.items()
        if reader is not None
    ]
    try:
        with torch.no_grad(), watching([target for target in targets.values() if readers[target.name] is None], note):
            model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _call(target: Target, tokens: int | Mapping[str, Call]) -> Call:
    if not isinstance(tokens, int):
        if target.name not in tokens:
            raise ValueError(f"{target.name} is a target, but the traced forward pass does not call it")
        return tokens[target.name]
    parent, _, last = target.name.rpartition(".")
    if is_convolution(target.module):
        return Call(tokens, target.name, elements_before(target.module, tokens))
    match = _SIBLINGS.fullmatch(last)
    return Call(tokens, (parent, match.lastgroup if match else last))


def _stack(
    name: str,
    members: list[Target],
    rank: tuple[int, int],
    calls: list[Call],
    config: TCURConfig,
    lora_rank: int,
    dtype: torch.dtype | None,
    kept: Mapping[str, set[object]],
) -> StackPlan:
    out_features, in_features = members[0].shape
    slices = sum(target.slices for target in members)
    size = (dtype or members[0].weight.dtype).itemsize
    wide = max(4, size)
    c, r = rank
    blocks = config.blocks(slices)
    convolution = is_convolution(members[0].module)
    rides = config.rides(slices) and not convolution
    factors = blocks * ((0 if rides else out_features * c) + r * in_features)
    trains_all = config.trainable == "all"
    base, lora = Cost(), Cost()
    tcur = Cost(
        trained=blocks * c * r + (factors if trains_all else 0),
        factors=0 if trains_all else factors * size,
        file=stack_file_bytes(name, members, rank, config),
    )
    for target, call in zip(members, calls, strict=True):
        sizes = LayerSizes(call.tokens, target.slices, slices, out_features, in_features, c, r, config)
        elements_of_x = call.elements if convolution else call.tokens * in_features
        layer: LayerCost | RidingCost | ConvolutionCost
        if convolution:
            transposed = bool(getattr(target.module, "transposed", False))
            layer = ConvolutionCost(**vars(sizes), transposed=transposed, elements=call.elements)
        else:
            layer = layer_cost(sizes)
        base += Cost(forward=layer.base(), backward=layer.base())
        elements, keeps_x = layer.saved()
        tcur += Cost(
            forward=layer.forward(),
            backward=layer.backward(),
            saved=elements * size + layer.saved_casts(size) + _once(kept["tcur"], call, keeps_x, elements_of_x) * size,
        )
        trained = lora_rank * (in_features + target.slices * out_features)
        lora += Cost(
            trained=trained,
            forward=2 * call.tokens * trained,
            backward=4 * call.tokens * trained,
            saved=(call.tokens * lora_rank + _once(kept["lora"], call, True, elements_of_x)) * size,
            file=trained * wide + 2 * 150,  # PEFT saves tensors in float32; each takes about 150 bytes in the header
        )
    q = r * config.along.call_shape(slices, 1, blocks).blocks
    crossover = in_features * out_features / (in_features + out_features)
    tokens = sum(call.tokens for call in calls)
    return StackPlan(
        name, len(members), slices, (out_features, in_features), rank, q, tokens, crossover, base, tcur, lora
    )


def _once(kept: set[object], call: Call, keeps_x: bool, elements: int) -> int:
    """The elements of x if this layer is the first to save it, else 0."""
    if not keeps_x or call.source in kept:
        return 0
    kept.add(call.source)
    return elements
