"""A number of numbers for all cores together, spread over stacks as ranks."""

from __future__ import annotations

from collections.abc import Sequence


def spread_budget(budget: int, slices: Sequence[int], energies: Sequence[Sequence[float]]) -> list[int]:
    """The rank r of every stack, whose core then has ``S r^2`` numbers.

    Every stack starts at rank 1. Then, step by step, that stack grows by one whose next direction holds the most energy
    for each of the ``S (2r + 1)`` numbers that it takes, of those that the rest of the budget allows (of equals the one
    of lower rank, then the first), until none can grow.

    Args:
        budget: How many numbers all cores may have together.
        slices: S of every stack.
        energies: What the 1st, 2nd, ... singular direction of every stack holds
            (:func:`tcurlora_ext.maths.spectrum.energy_by_rank`); the largest possible rank is their count.

    Returns:
        One rank a stack.

    Raises:
        ValueError: The budget is below rank 1 everywhere.
    """
    ranks = [1] * len(slices)
    left = budget - sum(slices)
    if left < 0:
        raise ValueError(f"budget is {budget} numbers, expected at least {sum(slices)}: rank 1 for every stack")

    def cost(stack: int) -> int:
        return slices[stack] * (2 * ranks[stack] + 1)

    def worth(stack: int) -> tuple[float, int]:
        return energies[stack][ranks[stack]] / cost(stack), -ranks[stack]

    stacks = range(len(slices))
    while growing := [i for i in stacks if ranks[i] < len(energies[i]) and cost(i) <= left]:
        best = max(growing, key=worth)
        left -= cost(best)
        ranks[best] += 1
    return ranks
