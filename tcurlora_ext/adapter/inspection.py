"""What an adapter chose and what it changes, as plain numbers: from an adapter file, or from an adapted model.

With a base: for slice l, ``|dW_l|_F`` and ``|dW_l|_F / |W_l|_F``; for frequency k of the slice transform, its part of
the energy ``sum_l |dW_l|^2``. By Parseval that sum is ``(scale^2 / S) sum_k |C_k U_k R_k|^2`` over the S frequencies of
the DFT; k and S - k are conjugates and count as one, so that k = 0..S//2. The DCT has S frequencies, the identity none.

No out x in matrix is formed: ``|col B row|^2 = <col^T col B, B row row^T>``, everything in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.maths.packing import MiddleBlocks, core_at, unfold_core
from tcurlora_ext.maths.selection import column_scores, row_scores
from tcurlora_ext.maths.spectrum import spectrum

from .files import AdapterFile
from .inject import adapted_layers, require_container, stacks
from .stack import TCURStack


@dataclass(frozen=True)
class BaseInspection:
    """What takes the base weights (S, out, in) to know.

    delta_norms, base_norms   |dW_l|_F with the scale, and |W_l|_F, per slice
    delta_energy              per frequency, adding up to sum_l |dW_l|^2; empty for the identity
    column_scores, row_scores   norm scores of all input features (in,), and of all output features on the chosen
                              columns (out,), as the rule "norm" ranks them, whatever rule chose
    """

    shape: tuple[int, int]
    delta_norms: list[float]
    base_norms: list[float]
    delta_energy: list[float]
    column_scores: list[float]
    row_scores: list[float]


@dataclass(frozen=True)
class StackInspection:
    """One stack. ``columns`` are input features and ``rows`` output features, best first, with the scores of the rule.

    core_norms    |U_l|_F per slice, core_energy |U_k|^2 per frequency (a sum of all: |U|^2; empty for the identity)
    base          None where only the adapter file is at hand
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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(value, "__dict__", value) for name, value in self.__dict__.items()}


def inspect_file(file: AdapterFile) -> list[StackInspection]:
    """What the file alone says of its stacks."""
    found = []
    for name, about in file.stacks.items():
        core, rows, columns = (file.tensors[f"{kind}.{name}"] for kind in ("core", "rows", "columns"))
        core, slices = core.double(), len(about["names"])
        in_slices = core if file.config.core_domain == "slice" else unfold_core(core, file.config.transform, slices)
        found.append(
            StackInspection(
                name, list(about["names"]), (core.shape[1], core.shape[2]), file.config.transform,
                file.config.selection, about["scale"], columns.tolist(), about["column_scores"], rows.tolist(),
                about["row_scores"], *_core_numbers(in_slices, file.config.transform),
            )
        )  # fmt: skip
    return found


@torch.no_grad()
def inspect_model(model: nn.Module) -> list[StackInspection]:
    """The stacks of an adapted model, merged or not. Raises ValueError where it is not adapted."""
    require_container(model)
    found = []
    for name, stack in stacks(model).items():
        layers = [layer for _, layer in adapted_layers(model) if layer.stack is stack]
        weights = [layer.weight_slices() for layer in sorted(layers, key=lambda layer: layer.first_slice)]
        found.append(
            StackInspection(
                name, list(stack.names), stack.rank, stack.transform, stack.rule, stack.scale, stack.columns.tolist(),
                stack.column_scores, stack.rows.tolist(), stack.row_scores,
                *_core_numbers(stack.core_slices().double(), stack.transform), _against_base(stack, torch.cat(weights)),
            )
        )  # fmt: skip
    return found


def _core_numbers(core: Tensor, transform: str) -> tuple[list[float], list[float]]:
    """``core_norms`` and ``core_energy`` of U (S, c, r), float64."""
    blocks, weights = spectrum(core, transform)
    energy = weights * blocks.abs().square().sum((1, 2))
    return core.norm(dim=(1, 2)).tolist(), [] if transform == "identity" else energy.tolist()


def _against_base(stack: TCURStack, weights: Tensor) -> BaseInspection:
    """Everything that takes the base weights (S, out, in)."""
    scores = column_scores(weights)
    return BaseInspection(
        shape=stack.shape,
        delta_norms=delta_norms(stack).tolist(),
        base_norms=[float(weight.double().norm()) for weight in weights],
        delta_energy=delta_energy(stack).tolist(),
        column_scores=scores.tolist(),
        row_scores=row_scores(weights, stack.columns).tolist(),
    )


def delta_norms(stack: TCURStack) -> Tensor:
    """``|dW_l|_F`` of every slice, scale included: (S,) float64."""
    core, col, row = stack.core_fourier().double(), stack.col.double(), stack.row.double()
    if stack.transform == "identity":
        C, R = stack.C.double(), stack.R.double()
        squares = _product_energy(C.mT @ C, core, R @ R.mT)
    else:
        of_col, of_row = col.T @ col, row @ row.T
        squares = torch.stack([
            _product_energy(of_col, _middle(stack, core, layer), of_row) for layer in range(stack.slices)
        ])  # fmt: skip
    return stack.scale * squares.clamp_min(0).sqrt()


def delta_energy(stack: TCURStack) -> Tensor:
    """The part of every frequency in ``sum_l |dW_l|^2``, (S//2 + 1,); (S,) for the DCT, (0,) without one."""
    if stack.transform == "identity":
        return torch.empty(0, dtype=torch.float64)
    C, weights = spectrum(stack.C.double(), stack.transform)
    U, _ = spectrum(stack.core_slices().double(), stack.transform)
    R, _ = spectrum(stack.R.double(), stack.transform)
    # Orthonormal factors: each of the two products of the DFT brings a sqrt(S).
    norm = stack.slices**2 if stack.transform == "dft" else 1
    return stack.scale**2 * norm * weights * _product_energy(C.mH @ C, U, R @ R.mH).clamp_min(0)


def _product_energy(of_left: Tensor, middle: Tensor, of_right: Tensor) -> Tensor:
    """``|A M B|^2`` from A^H A, M and B B^H, over leading dimensions."""
    return ((of_left @ middle) * (middle @ of_right).conj()).sum((-2, -1)).real


def _middle(stack: TCURStack, core: Tensor, layer: int) -> Tensor:
    """B_l as one matrix (c*S, r*S), in the order of the blocks of col and row."""
    low = stack.blocks < stack.slices
    core, first = (core_at(core, layer, stack.slices), 0) if low else (core, layer)
    blocks = MiddleBlocks(core, first, 1, stack.transform)
    single, pairs = list(blocks.single[0]), list(blocks.pair[0])
    if stack.transform == "dct":
        return torch.block_diag(*single)
    return torch.block_diag(single[0], *pairs, *single[1:])
