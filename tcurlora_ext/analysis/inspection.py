"""What an adapter chose and how much it changes, from an adapter file or from an adapted model.

With the base weights there are also, for slice l, ``|dW_l|_F`` and ``|W_l|_F``, and for frequency k of the slice
transform its part of the energy ``sum_l |dW_l|^2``. By Parseval this sum is ``(scale^2 / S) sum_k |C_k U_k R_k|^2``
over the S frequencies of the DFT. The conjugates k and S - k count as one, so that k = 0..S//2. The DCT has S
frequencies, the identity none.

No (out, in) matrix is formed: ``|col B row|^2 = <col^T col B, B row row^T>``. All is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tcurlora_ext.adapter.files.format import AdapterFile
from tcurlora_ext.adapter.model.structure import adapted_layers, base_weights, require_adapted, stacks
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.folding import unfold_core
from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.selection import column_scores, row_scores
from tcurlora_ext.maths.transforms import transform_named


@dataclass(frozen=True)
class BaseInspection:
    """The part of an inspection that needs the base weights (S, out, in).

    Attributes:
        shape: (out, in) of a slice.
        delta_norms: ``|dW_l|_F`` per slice, scale included.
        base_norms: ``|W_l|_F`` per slice.
        delta_energy: The energy per frequency; the sum is ``sum_l |dW_l|^2``. Empty for the identity.
        column_scores: The scores of all input features (in,) under the rule "norm", whichever rule chose.
        row_scores: The scores of all output features (out,) under the rule "norm", on the chosen columns; empty where
            C is learned.
    """

    shape: tuple[int, int]
    delta_norms: list[float]
    base_norms: list[float]
    delta_energy: list[float]
    column_scores: list[float]
    row_scores: list[float]


@dataclass(frozen=True)
class StackInspection:
    """The inspection of one stack.

    Attributes:
        name: The stack's name.
        names: The module of each slice.
        rank: (c, r).
        transform: The name of the slice transform.
        selection: The name of the rule that chose columns and rows.
        scale: The factor of C * U * R.
        columns: The chosen input features, best first; none where C is learned.
        column_scores: Their scores under the rule.
        rows: The chosen output features, best first; none where R is learned.
        row_scores: Their scores under the rule.
        core_norms: ``|U_l|_F`` per slice.
        core_energy: ``|U_k|^2`` per frequency; the sum is ``|U|^2``. Empty for the identity.
        base: The part that needs the base weights; None for an adapter file.
        kernel: The size of the kernel where the layers are convolutions. Empty for others, and for an adapter file,
            which does not say it.
        transposed: Whether they are transposed convolutions.
    """

    name: str
    names: list[str]
    rank: tuple[int, int]
    transform: str
    selection: str
    scale: float
    columns: list[int]
    column_scores: list[float]
    rows: list[int]
    row_scores: list[float]
    core_norms: list[float]
    core_energy: list[float]
    base: BaseInspection | None = None
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def headings(self) -> tuple[str, str]:
        """What the columns and the rows are."""
        return ("input channel", "output channel") if self.kernel else ("input feature", "output feature")

    @property
    def labels(self) -> tuple[list[str], list[str]]:
        """The chosen columns and rows by number, as "9", or with a tap of the kernel, as "9, tap (0,0,1)".

        A column of a convolution is a pair of an input channel and a tap, and a row of a transposed one a pair of an
        output channel and a tap.
        """
        taps = prod(self.kernel)

        def label(index: int) -> str:
            channel, tap = divmod(index, taps)
            return f"{channel}, tap ({','.join(map(str, np.unravel_index(tap, self.kernel)))})"

        plain = [list(map(str, self.columns)), list(map(str, self.rows))]
        if taps == 1:
            return plain[0], plain[1]
        if self.transposed:
            return plain[0], list(map(label, self.rows))
        return list(map(label, self.columns)), plain[1]

    def to_json(self) -> dict[str, Any]:
        """The inspection as lists, dicts, strings and numbers."""
        return {name: getattr(value, "__dict__", value) for name, value in self.__dict__.items()}


def inspect_file(file: AdapterFile) -> list[StackInspection]:
    """Inspect the stacks of an adapter file, without base weights."""
    found = []
    for name, about in file.stacks.items():
        core, rows, columns = (file.tensors[f"{kind}.{name}"] for kind in ("core", "rows", "columns"))
        core, slices = core.double(), len(about["names"])
        in_slices = core if file.config.core_domain == "slice" else unfold_core(core, file.config.transform, slices)
        found.append(
            StackInspection(
                name, list(about["names"]), (core.shape[1], core.shape[2]), file.config.transform,
                file.config.selection, about["scale"], columns.tolist(), about["column_scores"], rows.tolist(),
                about["row_scores"], *_core_norms_and_energy(in_slices, file.config.transform),
            )
        )  # fmt: skip
    return found


@torch.no_grad()
def inspect_model(model: nn.Module) -> list[StackInspection]:
    """Inspect the stacks of an adapted model, merged or not. Raises ValueError where it is not adapted."""
    require_adapted(model)
    found = []
    for name, stack in stacks(model).items():
        options = stack.options
        first = next(layer for _, layer in adapted_layers(model) if layer.stack is stack)
        kernel, transposed = (first.kernel_size, first.transposed) if isinstance(first, _ConvNd) else ((), False)
        found.append(
            StackInspection(
                name, list(stack.names), stack.rank, options.transform, options.selection, stack.scale,
                stack.columns.tolist(), stack.column_scores, stack.rows.tolist(), stack.row_scores,
                *_core_norms_and_energy(stack.core_slices().double(), options.transform),
                _against_base(stack, base_weights(model, stack)), kernel, transposed,
            )
        )  # fmt: skip
    return found


def _core_norms_and_energy(core: Tensor, transform: str) -> tuple[list[float], list[float]]:
    """``core_norms`` and ``core_energy`` of U (S, c, r), which is float64."""
    along = transform_named(transform)
    blocks, weights = along.spectrum(core)
    energy = weights * blocks.abs().square().sum((1, 2))
    return core.norm(dim=(1, 2)).tolist(), energy.tolist() if along.has_frequencies else []


def _against_base(stack: TCURStack, weights: Tensor) -> BaseInspection:
    """The part of the inspection that needs the base weights (S, out, in)."""
    scores = column_scores(weights)
    return BaseInspection(
        shape=stack.shape,
        delta_norms=delta_norms(stack).tolist(),
        base_norms=[float(weight.double().norm()) for weight in weights],
        delta_energy=delta_energy(stack).tolist(),
        column_scores=scores.tolist(),
        row_scores=row_scores(weights, stack.columns).tolist() if len(stack.columns) else [],
    )


def delta_norms(stack: TCURStack) -> Tensor:
    """``|dW_l|_F`` of every slice, scale included: (S,) float64."""
    col, core, row = stack.col.double(), stack.core_fourier().double(), stack.row.double()
    calls = [stack.options.along.calls(col, core, row, stack.slices, at, 1, 1.0)[0] for at in range(stack.slices)]
    grams: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # computed once for factors that several slices share
    squares = []
    for call in calls:
        key = (call.col.data_ptr(), call.row.data_ptr())
        if key not in grams:
            grams[key] = (call.col.T @ call.col, call.row @ call.row.T)
        squares.append(_product_energy(grams[key][0], _middle(call), grams[key][1]))
    return stack.scale * torch.stack(squares).clamp_min(0).sqrt()


def delta_energy(stack: TCURStack) -> Tensor:
    """The part of every frequency in ``sum_l |dW_l|^2``: (S//2 + 1,), (S,) for the DCT, (0,) for the identity."""
    along = stack.options.along
    if not along.has_frequencies:
        return torch.empty(0, dtype=torch.float64)
    C, weights = along.spectrum(stack.C.double())
    U, _ = along.spectrum(stack.core_slices().double())
    R, _ = along.spectrum(stack.R.double())
    norm = stack.scale**2 * along.product_energy(stack.slices)
    return norm * weights * _product_energy(C.mH @ C, U, R @ R.mH).clamp_min(0)


def _product_energy(left_gram: Tensor, middle: Tensor, right_gram: Tensor) -> Tensor:
    """``|A M B|^2`` from A^H A, M and B B^H, for every index of the leading dimensions."""
    return ((left_gram @ middle) * (middle @ right_gram).conj()).sum((-2, -1)).real


def _middle(call: Factors) -> Tensor:
    """B_l of a call for one slice, as one matrix (c*S, r*S) with blocks in the order of those of col and row."""
    blocks = MiddleBlocks(call.core, call.first_slice, 1, call.transform)
    first, *last = blocks.single[0]
    return torch.block_diag(first, *blocks.pair[0], *last)
