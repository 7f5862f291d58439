"""A parameter budget for all cores together, spread over the stacks as ranks."""

from __future__ import annotations

from collections.abc import Sequence


def spread_budget(budget: int, slices: Sequence[int], energies: Sequence[Sequence[float]]) -> list[int]:
    """Choose the rank r of every stack within a parameter budget; a core of rank r has ``S r^2`` parameters.

    Every stack starts at rank 1. Each further step raises the rank of one stack from r to r + 1, which adds
    ``S (2r + 1)`` parameters. Of the stacks for which the remaining budget suffices, it takes the one whose next
    singular direction holds the most energy per added parameter; ties go to the lower rank, then to the earlier stack.
    The last step is the one after which no stack can grow.

    Args:
        budget: The largest number of parameters that all cores together may have.
        slices: S of every stack.
        energies: For every stack the energy of its 1st, 2nd, ... singular direction
            (:func:`tcurlora_ext.maths.spectrum.energy_by_rank`); their count is the largest possible rank.

    Returns:
        One rank per stack.

    Raises:
        ValueError: The budget does not suffice for rank 1 in every stack.
    """
    ranks = [1] * len(slices)
    left = budget - sum(slices)
    if left < 0:
        raise ValueError(f"budget is {budget} parameters, expected at least {sum(slices)}: rank 1 for every stack")

    def cost(stack: int) -> int:
        return slices[stack] * (2 * ranks[stack] + 1)

    def gain(stack: int) -> tuple[float, int]:
        return energies[stack][ranks[stack]] / cost(stack), -ranks[stack]

    stacks = range(len(slices))
    while growing := [i for i in stacks if ranks[i] < len(energies[i]) and cost(i) <= left]:
        best = max(growing, key=gain)
        left -= cost(best)
        ranks[best] += 1
    return ranks
