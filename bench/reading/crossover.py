"""Where building dW becomes cheaper than the operator: from measured times, from counted FLOPs, and in closed form.

A crossover is a number of tokens T above which the variant that builds dW is cheaper. It is 0 where that variant is
cheaper at every measured point, and infinity where it is not even at the last one.

In closed form, one layer from in to out features (all its slices together) on T tokens with q = r S takes these FLOPs:

    operator       forward 2 T q (in + out)   backward the same
    dense layer    forward 2 q in out         backward 2 T in out + 2 q in out    (g^T x; the core's gradient from it)
    transient      forward 2 q in out         backward 2 T in out + 4 q in out    (and dW built again)

in addition to the frozen layer's 2 T in out in either pass. The middle product and its gradient, a share r / out of
these, are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..cases import MODES
from ..names import DENSE, FROZEN, TRANSIENT
from ..rows import Row, number, tcur_backend


def crossing(tokens: Sequence[float], operator: Sequence[float], dense: Sequence[float]) -> float:
    """The last T at which one measured curve falls below the other.

    Args:
        tokens: The T of each point, rising.
        operator: The operator's time at each point.
        dense: The time of the variant that builds dW.

    Returns:
        The T from which on ``dense`` is lower, by linear interpolation of the logarithm of the ratio over log T. 0
        where it is lower at every point, infinity where it is not lower at the last.

    Raises:
        ValueError: ``tokens`` do not rise, or there are not as many times as tokens.
    """
    if not len(tokens) == len(operator) == len(dense) > 0 or list(tokens) != sorted(set(tokens)):
        raise ValueError(f"found {list(tokens)} tokens, {len(operator)} and {len(dense)} times, expected rising tokens")
    gaps = [math.log(d / o) for o, d in zip(operator, dense, strict=True)]
    if gaps[-1] >= 0:
        return math.inf
    for index in range(len(gaps) - 2, -1, -1):
        if gaps[index] >= 0:
            at = gaps[index] / (gaps[index] - gaps[index + 1])
            return math.exp(math.log(tokens[index]) * (1 - at) + math.log(tokens[index + 1]) * at)
    return 0.0


def lines_cross(tokens: Sequence[float], operator: Sequence[float], dense: Sequence[float]) -> float:
    """The T above which the variant that builds dW takes fewer FLOPs, from the FLOPs at two or more T.

    FLOPs are linear in T, so the first and the last point determine both lines. 0 where the variant takes fewer FLOPs
    for every T > 0, infinity where it never does.
    """
    gaps = [d - o for o, d in zip(operator, dense, strict=True)]
    slope = (gaps[-1] - gaps[0]) / (tokens[-1] - tokens[0])
    if slope >= 0:
        return math.inf
    return max(0.0, tokens[0] - gaps[0] / slope)


def inference(in_features: int, out_features: int) -> float:
    """The T above which building dW costs less than the operator in inference: in out / (in + out), for any q."""
    return in_features * out_features / (in_features + out_features)


def training(in_features: int, out_features: int, width: int, transient: bool = False) -> float:
    """The same in training, for q = ``width``: 2 q in out / (2 q (in + out) - in out), with 3 q for a transient dW.

    Infinity where 2 q (in + out) <= in out: then the gradient of a dense dW costs more than the operator for any T.
    """
    area = in_features * out_features
    saved = 2 * width * (in_features + out_features) - area
    return (3 if transient else 2) * width * area / saved if saved > 0 else math.inf


@dataclass(frozen=True)
class Crossover:
    """The T above which a variant that builds dW is cheaper than the operator.

    Attributes:
        mode: "training" or "inference".
        operator: The operator's variant.
        dense: The variant that builds dW.
        measured: By measured times.
        counted: By counted FLOPs.
        formula: In closed form.
        lowest: The fewest tokens that were measured.
        highest: The most.
    """

    mode: str
    operator: str
    dense: str
    measured: float
    counted: float
    formula: float
    lowest: float
    highest: float


def crossovers(rows: list[Row]) -> list[Crossover]:
    """The crossovers of the sweep over tokens in a file's rows, per mode and variant that builds dW.

    The operator is that of the fastest backend, by :func:`tcurlora_ext.bench.rows.tcur_backend`.
    """
    sweep = [row for row in rows if row["sweep"] == "tokens"]
    there = {(row["mode"], row["variant"]) for row in sweep}
    return [
        _crossover([row for row in sweep if row["mode"] == mode], tcur_backend(sweep), dense)
        for mode in MODES
        for dense in (DENSE, TRANSIENT)
        if (mode, dense) in there
    ]


def _crossover(rows: list[Row], operator: str, dense: str) -> Crossover:
    tokens, (ours, theirs) = curves(rows, (operator, dense), "tokens")
    times, flops = (
        [[number(row, column) for row in side] for side in (ours, theirs)] for column in ("median_ms", "gflop")
    )
    first = ours[0]
    into, out = int(first["in"]), int(first["out"]) * int(first["slices"])
    training_ = first["mode"] == "training"
    formula = training(into, out, int(first["q"]), dense == TRANSIENT) if training_ else inference(into, out)
    return Crossover(
        first["mode"], operator, dense, crossing(tokens, *times), lines_cross(tokens, *flops), formula,
        tokens[0], tokens[-1],
    )  # fmt: skip


def curves(rows: list[Row], variants: Sequence[str], column: str) -> tuple[list[float], list[list[Row]]]:
    """The values of a column, rising, at which all the variants were measured, and each variant's rows there."""
    at = [{number(row, column): row for row in rows if row["variant"] == variant} for variant in variants]
    common = sorted(set.intersection(*(set(points) for points in at)))
    if len(common) < 2:
        raise ValueError(f"found {len(common)} points of {' and '.join(variants)} over {column}, expected 2 at least")
    return common, [[points[x] for x in common] for points in at]


@dataclass(frozen=True)
class Merge:
    """Inference with a dW that is built once and merged, compared with the operator at every call.

    Attributes:
        operator: The operator's variant.
        build_ms: Time to build W + dW: the dense layer's minus the frozen layer's, the median over the sweep's points.
        token_us: The operator's time per token minus the frozen layer's, at the most tokens that were measured.
        measured: The number of tokens, over all calls together, after which merging has saved as much time as it took.
        formula: The same by FLOPs.
    """

    operator: str
    build_ms: float
    token_us: float
    measured: float
    formula: float


def merge(rows: list[Row]) -> Merge:
    """Merging, by the sweep over tokens in a file's rows. ValueError where that has no inference."""
    sweep = [row for row in rows if row["sweep"] == "tokens"]
    operator = tcur_backend(sweep)
    inferring = [row for row in sweep if row["mode"] == "inference"]
    tokens, sides = curves(inferring, (FROZEN, operator, DENSE), "tokens")
    frozen, ours, dense = ([number(row, "median_ms") for row in side] for side in sides)
    build = statistics.median(d - f for f, d in zip(frozen, dense, strict=True))
    token = (ours[-1] - frozen[-1]) / tokens[-1]
    into, out = int(sides[0][0]["in"]), int(sides[0][0]["out"]) * int(sides[0][0]["slices"])
    return Merge(operator, build, 1e3 * token, build / token if token > 0 else math.inf, inference(into, out))
