"""Where building dW becomes cheaper than the operator: from measured times, from counted FLOPs, and in closed form.

An answer is a number of tokens T: above it the dense form is cheaper. 0 says that it is everywhere among the points,
and infinity that it is not even at the last one.

By count, for one layer of in -> out (all row blocks together), T tokens and q = r S, in FLOPs:

    operator       forward 2 T q (in + out)   backward the same
    dense layer    forward 2 q in out         backward 2 T in out + 2 q in out    (g^T x; the core's gradient from it)
    transient      forward 2 q in out         backward 2 T in out + 4 q in out    (and dW built again)

beside the frozen layer's 2 T in out each way. The middle product and its gradient, r / out of these, are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..cases import MODES
from ..rows import Row, number, tcur_backend
from ..variants import FLOOR

DENSE, TRANSIENT, STACK = "tcur dense layer", "tcur transient", "tcur dense stack"


def crossing(tokens: Sequence[float], operator: Sequence[float], dense: Sequence[float]) -> float:
    """The last T at which the dense form becomes the cheaper one of two measured curves.

    The logarithm of their ratio is interpolated linearly in log T. 0 where ``dense`` is lower at every point, infinity
    where it is not lower at the last. ValueError unless ``tokens`` rise and there are as many of each.
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
    """The T above which the dense form takes fewer FLOPs; both grow by a constant a token, so two points tell.

    0 where it takes fewer for every T > 0, infinity where it does for none.
    """
    gaps = [d - o for o, d in zip(operator, dense, strict=True)]
    slope = (gaps[-1] - gaps[0]) / (tokens[-1] - tokens[0])
    if slope >= 0:
        return math.inf
    return max(0.0, tokens[0] - gaps[0] / slope)


def inference(in_features: int, out_features: int) -> float:
    """T above which a forward pass builds dW for less than the operator takes: in out / (in + out), whatever q."""
    return in_features * out_features / (in_features + out_features)


def training(in_features: int, out_features: int, width: int, transient: bool = False) -> float:
    """The same for forward and backward of q = ``width``: 2 q in out / (2 q (in + out) - in out), 3 for a transient dW.

    Infinity where 2 q (in + out) <= in out: the gradient of a dense dW then costs more than the operator on any input.
    """
    area = in_features * out_features
    saved = 2 * width * (in_features + out_features) - area
    return (3 if transient else 2) * width * area / saved if saved > 0 else math.inf


@dataclass(frozen=True)
class Crossover:
    """Measured, by the FLOPs that were counted, and in closed form, between two variants of one mode.

    highest   the most tokens that were measured
    lowest    the fewest
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
    """What the sweep over tokens of one file says, for both modes and both dense forms where they are there.

    The operator is the backend with the least time in all.
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
    """The points that all the variants have, rising, and each one's rows there."""
    at = [{number(row, column): row for row in rows if row["variant"] == variant} for variant in variants]
    common = sorted(set.intersection(*(set(points) for points in at)))
    if len(common) < 2:
        raise ValueError(f"found {len(common)} points of {' and '.join(variants)} over {column}, expected 2 at least")
    return common, [[points[x] for x in common] for points in at]


@dataclass(frozen=True)
class Merge:
    """A dW that is built once and merged, beside the operator for every token, without gradients.

    build_ms    to build W + dW: the dense layer's time over the frozen one's, the median of the sweep's points
    token_us    what a token costs the operator over the frozen layer, at the most tokens
    measured    after how many tokens in all, over all calls, merging has paid; ``formula`` by count
    """

    operator: str
    build_ms: float
    token_us: float
    measured: float
    formula: float


def merge(rows: list[Row]) -> Merge:
    """From the sweep over tokens of one file. ValueError where it has no inference."""
    sweep = [row for row in rows if row["sweep"] == "tokens"]
    operator = tcur_backend(sweep)
    inferring = [row for row in sweep if row["mode"] == "inference"]
    tokens, sides = curves(inferring, (FLOOR, operator, DENSE), "tokens")
    floor, ours, dense = ([number(row, "median_ms") for row in side] for side in sides)
    build = statistics.median(d - f for f, d in zip(floor, dense, strict=True))
    token = (ours[-1] - floor[-1]) / tokens[-1]
    into, out = int(sides[0][0]["in"]), int(sides[0][0]["out"]) * int(sides[0][0]["slices"])
    return Merge(operator, build, 1e3 * token, build / token if token > 0 else math.inf, inference(into, out))
