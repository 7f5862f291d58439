"""What is remarkable about an adapter, in a few sentences made from its inspection."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inspection import StackInspection

SHOWN = 3  # names of layers in a sentence


def remarks(found: Sequence[StackInspection]) -> str:
    """One paragraph: how far which layers moved, what they share, and whether the chosen features stand out.

    Args:
        found: The inspections of an adapter's stacks.
    """
    if not any(norm for one in found for norm in one.core_norms):
        return "All cores are zero: the adapter changes nothing, as before training."
    sentences = [_moved(found), _concentration(found), _common(found), _chosen(found)]
    return " ".join(sentence for sentence in sentences if sentence)


def _moved(found: Sequence[StackInspection]) -> str:
    """The size of the change beside the weights, and the layers with the largest and the smallest."""
    ratios = {
        name: delta / norm
        for one in found
        if one.base is not None
        for name, delta, norm in zip(one.names, one.base.delta_norms, one.base.base_norms, strict=True)
        if norm
    }
    if not ratios:
        return f"Without base weights only the cores can be compared; the largest is that of {_largest_core(found)}."
    order = sorted(ratios, key=lambda name: -ratios[name])
    total = sum(norm**2 for one in found if one.base for norm in one.base.delta_norms) ** 0.5
    weights = sum(norm**2 for one in found if one.base for norm in one.base.base_norms) ** 0.5
    most = ", ".join(f"{name} ({ratios[name]:.2%})" for name in order[:SHOWN])
    last = f"; least moved {order[-1]} ({ratios[order[-1]]:.2%})" if len(order) > SHOWN else ""
    return f"The adapter changes the weights by {total / weights:.2%} of their norm. Most moved {most}{last}."


def _largest_core(found: Sequence[StackInspection]) -> str:
    return max((norm, name) for one in found for norm, name in zip(one.core_norms, one.names, strict=True))[1]


def _concentration(found: Sequence[StackInspection]) -> str:
    """In how many slices half of the change's energy is."""
    energies = [n**2 for one in found for n in (one.core_norms if one.base is None else one.base.delta_norms)]
    if len(energies) < 2:
        return ""
    half, taken, count = sum(energies) / 2, 0.0, 0
    for energy in sorted(energies, reverse=True):
        if taken >= half:
            break
        taken, count = taken + energy, count + 1
    what = "the change's" if found[0].base is not None else "the cores'"
    return f"Half of {what} energy is in {count} of {len(energies)} slices."


def _common(found: Sequence[StackInspection]) -> str:
    """How much of the change all slices of a stack have in common, in stacks of several: frequency 0."""
    several = [one for one in found if len(one.names) > 1]
    spectra = [one.core_energy if one.base is None else one.base.delta_energy for one in several]
    total = sum(map(sum, spectra))
    return f"All slices of a stack have {sum(e[0] for e in spectra if e) / total:.0%} of it in common." if total else ""


def _chosen(found: Sequence[StackInspection]) -> str:
    """How far the scores of the chosen input features stand out from the median of all."""
    factors = [
        one.base.column_scores[index] / median
        for one in found
        if one.base is not None and (median := statistics.median(one.base.column_scores)) > 0
        for index in one.columns
    ]
    if not factors:
        return ""
    text = f"The chosen input features have {min(factors):.1f} to {max(factors):.1f} times the median feature's score"
    return f"{text}, so that they hardly stand out." if max(factors) < 1.5 else f"{text}."
