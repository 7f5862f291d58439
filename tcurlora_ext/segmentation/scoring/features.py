"""What the features that an adapter chose are, how stable the choice is, and what each does to a prediction.

A *slot* is a row or a column of the cores U of a stack. Row slot k reads h_k = R_k x, where R_k is output feature
``rows[k]`` of the base weights; column slot k writes C_k, their input feature ``columns[k]``. Each question has a
control:

- overlap of two choices: the Jaccard index that is expected of two random choices of these sizes;
- the Dice that is lost without a slot: the Dice lost without a random direction of the same core;
- where h_k is active: the same of random rows of the same weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.model.structure import base_weights, stacks
from tcurlora_ext.adapter.options import GIVEN, WEIGHTS
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.maths.selection import column_scores, row_scores, select
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.metrics.evaluation import OVERLAP, dice_scores, finite_mean, one_hot_pair, predict
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec

ROW, COLUMN = SIDES = ("row", "column")
CHOSEN, RANDOM = "chosen", "random"
UNETR_PATCH = 16  # MONAI's UNETR has no other

Row = dict[str, Any]
# (stack, side) -> the chosen features, and of how many
Choice = dict[tuple[str, str], tuple[list[int], int]]


@dataclass(frozen=True)
class Slot:
    """A row or a column of a stack's cores.

    Attributes:
        stack: The stack's name.
        layers: Its modules, with * for what differs between them.
        side: "row" or "column".
        slot: Its number from 0, in the order of the choice.
        feature: The output feature (row) or input feature (column) of the base; None where the factor is learned.
        norm_rank: The feature's place among all by the paper's rule, 1 for the largest norm; None as above.
    """

    stack: str
    layers: str
    side: str
    slot: int
    feature: int | None
    norm_rank: int | None


def find_slots(model: nn.Module, only: Sequence[str] = ()) -> list[Slot]:
    """The slots of an adapted model's stacks.

    Args:
        model: The model.
        only: Names of stacks; by default all.

    Raises:
        ValueError: There is no stack of such a name.
    """
    found, there = [], stacks(model)
    unknown = sorted(set(only) - set(there))
    if unknown:
        raise ValueError(f"stack: found {', '.join(unknown)}, expected among {', '.join(there)}")
    for name, stack in there.items():
        if only and name not in only:
            continue
        layers = ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+", "*", part) for part in stack.names))
        for side, size in zip(SIDES, reversed(stack.rank), strict=True):
            features: list[int] = _features(stack, side).tolist()
            places = _norm_ranks(model, stack, side) if features else []
            for slot in range(size):
                known = slot < len(features)
                found.append(Slot(name, layers, side, slot, features[slot] if known else None,
                                  places[features[slot]] if known else None))  # fmt: skip
    return found


def _features(stack: TCURStack, side: str) -> Tensor:
    return stack.rows if side == ROW else stack.columns


def _norm_ranks(model: nn.Module, stack: TCURStack, side: str) -> list[int]:
    """The place of every feature by its norm: over all inputs for columns, over the chosen columns for rows."""
    weights = base_weights(model, stack)
    all_columns = torch.arange(weights.shape[2], device=weights.device)
    of_rows = stack.columns if len(stack.columns) else all_columns
    scores = column_scores(weights) if side == COLUMN else row_scores(weights, of_rows)
    places: list[int] = (scores.argsort(descending=True, stable=True).argsort() + 1).tolist()
    return places


# -- how stable the choice is -----------------------------------------------------------------------------------------


def choice_of(model: nn.Module) -> Choice:
    """The features that an adapted model's stacks have chosen; learned factors have none."""
    return {
        (name, side): (_features(stack, side).tolist(), stack.shape[side == COLUMN])
        for name, stack in stacks(model).items()
        for side in SIDES
        if len(_features(stack, side))
    }


def choice_at(model: nn.Module, factor: float) -> Choice:
    """What the rules of an adapted model's stacks choose at another rank; nothing where a rule reads more than weights.

    Args:
        model: The model.
        factor: On both ranks of every stack; the result is rounded, and at least 1 and at most a side of the weights.
    """
    found: Choice = {}
    for name, stack in stacks(model).items():
        if stack.options.factors != WEIGHTS or stack.options.selection in ("activation", GIVEN):
            continue
        c, r = (
            min(max(1, round(factor * n)), side) for n, side in zip(stack.rank, reversed(stack.shape), strict=True)
        )  # fmt: skip
        chosen = select(base_weights(model, stack), c, r, stack.options.selection, stack.options.seed)
        found[name, ROW] = chosen.rows.tolist(), stack.shape[0]
        found[name, COLUMN] = chosen.columns.tolist(), stack.shape[1]
    return found


def overlap(own: Choice, other: Choice) -> list[Row]:
    """How far two choices agree, for each stack and side that both have with as many features to choose from.

    Returns:
        Rows with stack, side, chosen and other_chosen (how many), shared, jaccard (shared over all that either chose),
        and random_jaccard, its expectation for two independent random choices of these sizes.
    """
    rows = []
    for key, (chosen, count) in own.items():
        if key not in other or other[key][1] != count:
            continue
        wanted = other[key][0]
        shared, both = len(set(chosen) & set(wanted)), len(set(chosen) | set(wanted))
        rows.append({
            "stack": key[0], "side": key[1], "chosen": len(chosen), "other_chosen": len(wanted), "shared": shared,
            "jaccard": shared / both, "random_jaccard": random_jaccard(len(chosen), len(wanted), count),
        })  # fmt: skip
    return rows


def random_jaccard(a: int, b: int, count: int) -> float:
    """The expected Jaccard index of two independent random choices.

    Args:
        a: How many the first has.
        b: How many the second has.
        count: Of how many.
    """
    from scipy.stats import hypergeom

    return float(
        sum(hypergeom.pmf(k, count, a, b) * k / (a + b - k) for k in range(max(0, a + b - count), min(a, b) + 1))
    )


# -- what a slot does -------------------------------------------------------------------------------------------------


@contextmanager
def without(stack: TCURStack, side: str, direction: Tensor) -> Iterator[float]:
    """Within this context, the core of a stack has nothing along a direction of its rows or columns.

    Args:
        stack: The stack.
        side: "row": U v = 0 afterwards; "column": v^T U = 0.
        direction: v of unit length, (r,) or (c,). The unit vector k is slot k.

    Yields:
        The share of ``|U|^2`` that is gone, 0 to 1.
    """
    core, v = stack.core, direction.to(stack.core)
    before = core.detach().clone()
    part = (before @ v)[..., None] * v if side == ROW else v[:, None] * (v @ before)[..., None, :]
    total = float(before.square().sum())
    try:
        with torch.no_grad():
            core.sub_(part)
        yield float(part.square().sum()) / total if total else 0.0
    finally:
        with torch.no_grad():
            core.copy_(before)


def label_dice(model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig) -> list[float]:
    """The mean Dice of each label over cases, 0 to 1; NaN where no case has it."""
    cases = [
        dice_scores(one_hot_pair(predict(model, volume, config.roi), volume.truth, config.out_channels))
        for volume in volumes
    ]
    return [finite_mean(values) for values in zip(*cases, strict=True)]


def contributions(
    model: nn.Module, volumes: Sequence[Volume], config: NetworkConfig, labels: Sequence[str], found: Sequence[Slot],
    *, seed: int = 0, on_step: Callable[[int, float], None] | None = None,
) -> list[Row]:  # fmt: skip
    """The Dice that is lost without each slot, and for each slot without a random direction of the same core.

    Args:
        model: An adapted model in eval mode; afterwards it is as before.
        volumes: The cases.
        config: Of the network.
        labels: Names of the foreground classes.
        found: The slots.
        seed: Of the random directions.
        on_step: Gets the number of predictions that are done, and the last loss of Dice.

    Returns:
        Rows with the slot's fields, kind ("chosen" or "random", which has no feature), share (of ``|U|^2``) and for
        each label "lost LABEL", the Dice with all slots minus that without, -1 to 1.
    """
    whole, rows = label_dice(model, volumes, config), []
    generator = torch.Generator().manual_seed(seed)
    for slot in found:
        stack = stacks(model)[slot.stack]
        size = stack.rank[slot.side == ROW]
        random = torch.randn(size, generator=generator, dtype=torch.float64)
        directions = {CHOSEN: torch.eye(size)[slot.slot], RANDOM: random / random.norm()}
        for kind, direction in directions.items():
            with without(stack, slot.side, direction) as share:
                dice = label_dice(model, volumes, config)
            lost = [before - after for before, after in zip(whole, dice, strict=True)]
            named = asdict(slot) | ({} if kind == CHOSEN else {"feature": None, "norm_rank": None})
            rows.append({**named, "kind": kind, "share": share}
                        | {f"lost {label}": value for label, value in zip(labels, lost, strict=True)})  # fmt: skip
            if on_step is not None:
                on_step(len(rows), finite_mean(lost))
    return rows


def most_needed(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """The name of the stack without whose row slots, one at a time, most Dice is lost in all.

    Args:
        rows: Of :func:`contributions`.
        labels: Names of the foreground classes.
    """
    lost: dict[str, float] = {}
    for row in rows:
        if (row["kind"], row["side"]) == (CHOSEN, ROW):
            lost[row["stack"]] = lost.get(row["stack"], 0.0) + finite_mean([row[f"lost {label}"] for label in labels])
    return max(lost, key=lambda name: lost[name])


# -- where it is active -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activity:
    """Where rows of a weight are active in a volume.

    Attributes:
        layer: The name of the slice.
        features: The output features that the chosen rows are, None where they are learned; then the random ones.
        maps: (chosen and random rows, X, Y, Z): rows of unit length times the layer's input, upsampled from patches.
        separation: Of each map: the probability that it is larger in a voxel of the foreground than in one of the
            background, or smaller if that is more probable; 0.5 says nothing of the labels. NaN without foreground.
    """

    layer: str
    features: list[int | None]
    maps: Tensor
    separation: list[float]

    @property
    def kinds(self) -> list[str]:
        """Of each map: "chosen" or "random"."""
        half = len(self.maps) // 2
        return [CHOSEN] * half + [RANDOM] * (len(self.maps) - half)


@torch.no_grad()
def most_changed(stack: TCURStack) -> int:
    """The slice of the largest ``|dW_l|_F``."""
    return max(range(stack.slices), key=lambda at: float(stack.delta_weights(range(at, at + 1)).norm()))


@torch.no_grad()
def activity(
    model: nn.Module, volume: Volume, config: NetworkConfig, stack: TCURStack, at: int, seed: int = 0
) -> Activity:  # fmt: skip
    """Activation maps of a stack's rows in one of its layers, and of as many random rows of that layer's weight.

    Args:
        model: The adapted model.
        volume: The case.
        config: Of the network.
        stack: A stack of the model.
        at: Index of the slice.
        seed: Of the random rows, of which none is a chosen one.

    Raises:
        ValueError: The network's tokens are not a grid of patches.
    """
    weight, chosen = base_weights(model, stack)[at], stack.rows.tolist()
    others = [index for index in range(len(weight)) if index not in chosen]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: stack.rank[1]]
    drawn = [others[index] for index in order.tolist()]
    rows = torch.cat([stack.R[at].detach().to(weight), weight[drawn]])
    first = max(first for first in stack.layers if first <= at)
    maps = _maps(model, stack.layers[first], volume.image, nn.functional.normalize(rows, dim=1), config)
    known: list[int | None] = [*(chosen or [None] * stack.rank[1]), *drawn]
    foreground = volume.label[0] > 0
    return Activity(stack.names[at], known, maps, [_separation(one, foreground) for one in maps])


def patch_grid(config: NetworkConfig) -> tuple[int, ...]:
    """How many patches a window has along each axis. ValueError where the tokens are not those of a grid of patches."""
    sizes: Mapping[str, Any] = {**get_spec(config.network).sizes, **config.sizes}
    if config.network not in ("vit", "unetr"):
        raise ValueError(f"network: found {config.network}, expected vit or unetr, whose tokens are a grid of patches")
    return tuple(length // int(sizes.get("patch_size", UNETR_PATCH)) for length in config.roi)


def _maps(model: nn.Module, layer: nn.Module, image: Tensor, rows: Tensor, config: NetworkConfig) -> Tensor:
    """(K, X, Y, Z): rows (K, in) times the input of a layer, in windows as a prediction has them."""
    from monai.inferers.utils import sliding_window_inference

    grid = patch_grid(config)
    seen: list[Tensor] = []

    def network(windows: Tensor) -> Tensor:
        seen.clear()
        model(windows)
        active = (seen[0] @ rows.T).transpose(1, 2)
        return nn.functional.interpolate(active.unflatten(2, grid), size=windows.shape[2:], mode="nearest")

    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        found = sliding_window_inference(
            torch.as_tensor(image)[None].to(rows.device), config.roi, 4, network, overlap=OVERLAP, mode="gaussian"
        )
    finally:
        handle.remove()
    return torch.as_tensor(found)[0].cpu()


def _separation(values: Tensor, foreground: Tensor) -> float:
    from scipy.stats import mannwhitneyu

    inside, outside = values[foreground].numpy(), values[~foreground].numpy()
    if not inside.size or not outside.size:
        return float("nan")
    larger = float(mannwhitneyu(inside, outside).statistic) / (inside.size * outside.size)
    return max(larger, 1 - larger)
