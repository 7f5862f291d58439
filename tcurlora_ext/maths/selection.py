"""Which columns (input features) and rows (output features) of a weight tensor become C and R.

Weights are (S, out, in), slices first; scores are float64. Below, ``S_k`` is frequency k of the DFT along the slices,
and sums over k run over all S frequencies. The rules by name:

``norm``
    The paper's rule: the c columns with the largest ``sum_k |S_k[:, j]|``, then the r rows with the largest
    ``sum_k |S_k[i, columns]|`` on those columns. tCURLoRA, arXiv 2501.02227.
``activation``
    As ``norm``, but every ``W_l[:, j]`` is first multiplied by the root mean square of input feature j of layer l,
    measured on calibration inputs. It carries Wanda's score (Sun et al. 2023, arXiv 2306.11695) over to stacks.
``norm-sampled``
    Drawn at random without replacement, with probabilities proportional to the squared norm over all slices. Drineas,
    Kannan, Mahoney 2006; Tarzanagh and Michailidis 2018 for tensors.
``inverse-norm``
    Drawn at random with the inverse of that probability, as CURLoRA does (arXiv 2408.14572).
``leverage``
    The largest statistical leverage scores: squared entries of the leading c (columns) or r (rows) singular vectors,
    summed over the vectors and over k.
``deim``
    Discrete empirical interpolation on the leading singular vectors of the two unfoldings. Sorensen and Embree 2016.
``uniform``
    Drawn at random, with equal probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tproduct import self_conjugate_frequencies

CHUNK = 64  # columns whose spectrum is in memory at a time: 64 columns of (48, 768, 768) take 38 MB of complex128


class Selection(NamedTuple):
    """The chosen rows and columns, best first, with their scores.

    Attributes:
        rows: Indices of output features, (r,) int64.
        columns: Indices of input features, (c,) int64.
        row_scores: Scores that the rule gave the rows, (r,) float64.
        column_scores: Scores that the rule gave the columns, (c,) float64.
    """

    rows: Tensor
    columns: Tensor
    row_scores: Tensor
    column_scores: Tensor

    @classmethod
    def none(cls, device: torch.device) -> Selection:
        """No rows and no columns: the choice of a stack whose C and R are learned.

        Args:
            device: That of the stack's weights.
        """
        index, score = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.float64)
        return cls(index, index, score, score)

    def without_rows(self) -> Selection:
        """The columns alone."""
        return self._replace(rows=self.rows[:0], row_scores=self.row_scores[:0])


class _Draw(NamedTuple):
    weights: Tensor
    c: int
    r: int
    generator: torch.Generator
    inputs: Tensor | None


def select(
    weights: Tensor, c: int, r: int, rule: str = "norm", seed: int = 0, inputs: Tensor | None = None
) -> Selection:
    """Choose columns and rows of weights by a rule of this module.

    Args:
        weights: (S, out, in), any floating dtype and device.
        c: How many columns, no more than in.
        r: How many rows, no more than out.
        rule: The name of the rule.
        seed: Seed of the rules that draw at random. They draw on the CPU, so that every device gives the same choice.
        inputs: Root mean squares of the input features (S, in); required by ``activation``, refused by other rules.

    Returns:
        The choice, on the device of the weights.

    Raises:
        ValueError: The rule is unknown, c or r does not fit, or ``inputs`` are missing, of another shape, or given to
            a rule that takes none.
    """
    if rule not in RULES:
        raise ValueError(f"selection rule {rule!r} is unknown, expected one of {', '.join(RULES)}")
    slices, out_features, in_features = weights.shape
    if not (0 < c <= in_features and 0 < r <= out_features):
        raise ValueError(f"cannot choose {c} of {in_features} columns and {r} of {out_features} rows")
    if (inputs is None) == (rule == "activation"):
        found = "no calibration inputs" if inputs is None else "calibration inputs"
        raise ValueError(f"selection {rule!r} found {found}; 'activation' needs them, other rules take none")
    if inputs is not None and inputs.shape != (slices, in_features):
        raise ValueError(f"calibration inputs have shape {tuple(inputs.shape)}, expected {(slices, in_features)}")
    draw = _Draw(weights.detach(), c, r, torch.Generator().manual_seed(seed), inputs)
    return RULES[rule](draw)


def _frequency_weights(slices: int, like: Tensor) -> Tensor:
    """How often each of the frequencies 0..S//2 occurs in the full spectrum, with its conjugate: (S//2 + 1,)."""
    weights = torch.full((slices // 2 + 1,), 2.0, dtype=torch.float64, device=like.device)
    weights[self_conjugate_frequencies(slices)] = 1.0
    return weights


def column_scores(weights: Tensor, inputs: Tensor | None = None) -> Tensor:
    """``sum_k |S_k[:, j]|_2`` for every column j.

    Args:
        weights: (S, out, in).
        inputs: (S, in), by which the columns of every slice are multiplied first; None: by nothing.

    Returns:
        (in,) float64.
    """
    per_frequency = []
    for start in range(0, weights.shape[2], CHUNK):
        chunk = weights[:, :, start : start + CHUNK].double()
        if inputs is not None:
            chunk = chunk * inputs[:, None, start : start + CHUNK].to(chunk)
        per_frequency.append(torch.fft.rfft(chunk, dim=0).norm(dim=1))
    return _frequency_weights(weights.shape[0], weights) @ torch.cat(per_frequency, dim=1)


def row_scores(weights: Tensor, columns: Tensor) -> Tensor:
    """``sum_k |S_k[i, columns]|_2`` for every row i.

    Args:
        weights: (S, out, in).
        columns: Indices of the columns to sum over.

    Returns:
        (out,) float64.
    """
    return column_scores(weights[:, :, columns].transpose(1, 2))


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # A stable sort takes the first of equal scores, on every device.
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return order, scores[order]


def _norm(draw: _Draw) -> Selection:
    columns, of_columns = _top(column_scores(draw.weights, draw.inputs), draw.c)
    rows, of_rows = _top(row_scores(draw.weights, columns), draw.r)
    return Selection(rows, columns, of_rows, of_columns)


def _sampled(scores: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``count`` different indices with probabilities proportional to the scores (Gumbel top-k)."""
    noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    keys = scores.cpu().log() - (-noise.log()).log()
    order = torch.sort(keys, descending=True, stable=True).indices[:count].to(scores.device)
    return order, scores[order]


def _tube_energy(weights: Tensor, dim: int) -> Tensor:
    """Squared norms of the rows (dim=1) or of the columns (dim=2), each over all slices, float64."""
    other = 3 - dim
    return torch.linalg.vector_norm(weights, dim=(0, other), dtype=torch.float64).square()


def _norm_sampled(draw: _Draw) -> Selection:
    columns, of_columns = _sampled(_tube_energy(draw.weights, 2), draw.c, draw.generator)
    rows, of_rows = _sampled(_tube_energy(draw.weights, 1), draw.r, draw.generator)
    return Selection(rows, columns, of_rows, of_columns)


def _inverse_norm(draw: _Draw) -> Selection:
    def inverse(energy: Tensor) -> Tensor:
        # A feature of norm zero has no inverse. As it adds nothing to dW, it gets the lowest probability, zero.
        return torch.where(energy > 0, 1.0 / energy, torch.zeros_like(energy))

    columns, of_columns = _sampled(inverse(_tube_energy(draw.weights, 2)), draw.c, draw.generator)
    rows, of_rows = _sampled(inverse(_tube_energy(draw.weights, 1)), draw.r, draw.generator)
    return Selection(rows, columns, of_rows, of_columns)


def _uniform(draw: _Draw) -> Selection:
    _, out_features, in_features = draw.weights.shape
    ones = torch.ones(max(out_features, in_features), dtype=torch.float64, device=draw.weights.device)
    columns, of_columns = _sampled(ones[:in_features], draw.c, draw.generator)
    rows, of_rows = _sampled(ones[:out_features], draw.r, draw.generator)
    return Selection(rows, columns, of_rows, of_columns)


def _leverage(draw: _Draw) -> Selection:
    slices, out_features, in_features = draw.weights.shape
    spectrum = torch.fft.rfft(draw.weights.double(), dim=0)
    of_row = torch.zeros(out_features, dtype=torch.float64, device=draw.weights.device)
    of_column = torch.zeros(in_features, dtype=torch.float64, device=draw.weights.device)
    for weight, matrix in zip(_frequency_weights(slices, draw.weights), spectrum, strict=True):
        left, _, right_h = torch.linalg.svd(matrix, full_matrices=False)
        of_row += weight * left[:, : draw.r].abs().square().sum(1)
        of_column += weight * right_h[: draw.c].abs().square().sum(0)
    columns, of_columns = _top(of_column, draw.c)
    rows, of_rows = _top(of_row, draw.r)
    return Selection(rows, columns, of_rows, of_columns)


def _leading_vectors(weights: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of the slices stacked by rows: (S, m, n) -> (n, count) float64."""
    gram = torch.zeros(weights.shape[2], weights.shape[2], dtype=torch.float64, device=weights.device)
    for matrix in weights:
        gram.addmm_(matrix.double().mT, matrix.double())
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def _interpolation_points(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """DEIM: one index per vector, where interpolation by the vectors before it has its largest error, the score."""
    points: list[int] = []
    errors: list[Tensor] = []
    for j in range(vectors.shape[1]):
        residual = vectors[:, j]
        if points:
            known = vectors[:, :j]
            residual = residual - known @ torch.linalg.solve(known[points], residual[points])
        error, point = residual.abs().max(0)
        points.append(int(point))
        errors.append(error)
    return torch.tensor(points, device=vectors.device), torch.stack(errors)


def _deim(draw: _Draw) -> Selection:
    columns, of_columns = _interpolation_points(_leading_vectors(draw.weights, draw.c))
    rows, of_rows = _interpolation_points(_leading_vectors(draw.weights.transpose(1, 2), draw.r))
    return Selection(rows, columns, of_rows, of_columns)


RULES: dict[str, Callable[[_Draw], Selection]] = {
    "norm": _norm,
    "activation": _norm,
    "norm-sampled": _norm_sampled,
    "leverage": _leverage,
    "deim": _deim,
    "uniform": _uniform,
    "inverse-norm": _inverse_norm,
}
