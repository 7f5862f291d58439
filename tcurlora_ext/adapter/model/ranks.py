"""The rank of every stack: one for all stacks, by the names of its layers, or from a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.options import fitting_pair, pair_of
from tcurlora_ext.adapter.stack.factors import require_finite
from tcurlora_ext.maths.budget import spread_budget
from tcurlora_ext.maths.spectrum import energy_by_rank

from .targets import Target, matches, slice_names, stacked_weights


def stack_ranks(groups: Mapping[str, Sequence[Target]], config: TCURConfig) -> dict[str, tuple[int, int]]:
    """The rank (c, r) of every stack, by the stack's name.

    A budget needs the weights; without one their shapes suffice. Raises ValueError where the budget is too small, where
    a pattern of ``rank_pattern`` matches no layer, where layers of one stack match different ranks, or where a rank is
    larger than a side of the weights.
    """
    if config.budget is not None:
        return _within_budget(config.budget, groups, config)
    names = [target.name for members in groups.values() for target in members]
    for pattern in config.rank_pattern:
        if not any(_is_meant(name, pattern) for name in names):
            raise ValueError(
                f"rank_pattern {pattern!r} matches none of the {len(names)} adapted modules, such as "
                f"{', '.join(names[:3])}"
            )
    return {stack: _stack_rank(stack, members, config) for stack, members in groups.items()}


def _stack_rank(name: str, members: Sequence[Target], config: TCURConfig) -> tuple[int, int]:
    try:
        return fitting_pair(_common_rank(members, config), members[0].shape)
    except ValueError as error:
        raise ValueError(f"stack {name} ({members[0].name}, ...): {error}") from None


def _is_meant(name: str, pattern: str) -> bool:
    return matches(name, pattern) or matches(name, [pattern])


def _rank_of(name: str, config: TCURConfig) -> tuple[int, int]:
    """The rank of the first pattern that matches this module, else ``config.rank``."""
    return pair_of(next((rank for p, rank in config.rank_pattern.items() if _is_meant(name, p)), config.rank))


def _common_rank(members: Sequence[Target], config: TCURConfig) -> tuple[int, int]:
    """The rank of a stack's members. Raises ValueError where they differ: the members share one core."""
    first, *others = [(target.name, _rank_of(target.name, config)) for target in members]
    odd = next((other for other in others if other[1] != first[1]), None)
    if odd is not None:
        raise ValueError(
            f"rank_pattern gives {first[0]} rank (c, r) = {first[1]} and {odd[0]} {odd[1]}, expected one rank for the "
            "layers of a stack; stack_by='role' or 'none' puts them into stacks of their own"
        )
    return first[1]


def _within_budget(
    budget: int, groups: Mapping[str, Sequence[Target]], config: TCURConfig
) -> dict[str, tuple[int, int]]:
    slices = [config.blocks(sum(target.slices for target in members)) for members in groups.values()]
    energies = [_energies(name, members, config) for name, members in groups.items()]
    ranks = spread_budget(budget, slices, energies)
    return {name: (rank, rank) for name, rank in zip(groups, ranks, strict=True)}


def _energies(name: str, members: Sequence[Target], config: TCURConfig) -> list[float]:
    weights = stacked_weights(name, members)
    if weights.is_meta:
        raise ValueError(
            f"budget is spread by the spectra of the weights, but {members[0].name} is on the meta device; expected a "
            "model with its weights, or ranks"
        )
    try:
        require_finite(weights, slice_names(members))
    except ValueError as error:
        raise ValueError(f"stack {name} ({members[0].name}, ...): {error}") from None
    return energy_by_rank(weights, config.transform, config.frequencies).tolist()
