"""What an adapter covers of a model, as a tree of the model's modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from tcurlora_ext.adapter.model.coverage import Coverage, Group

if TYPE_CHECKING:
    from rich.tree import Tree


Leaf = tuple[list[str], Group]  # the rest of its path, and what it is


def coverage_tree(covers: Coverage) -> Tree:
    """A tree with a leaf for each group of weights. A module without a linear layer is one leaf where it can be."""
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(str(covers), style="italic"))
    _grow(tree, [(group.name.split("."), group) for group in covers.groups()])
    return tree


def _grow(tree: Tree, leaves: Iterable[Leaf]) -> None:
    from rich.text import Text

    children: dict[str, list[Leaf]] = {}
    for (first, *rest), group in leaves:
        children.setdefault(first, []).append((rest, group))
    for name, inside in children.items():
        whole = _as_one(name, inside)
        if whole is not None:
            tree.add(Text(whole[0], style=whole[1]))
            continue
        path = [name]
        while all(rest for rest, _ in inside) and len({rest[0] for rest, _ in inside}) == 1:
            path.append(inside[0][0][0])
            inside = [(rest[1:], group) for rest, group in inside]
        branch = tree.add(Text(".".join(path)))
        for rest, group in inside:
            if not rest:  # a parameter of the module itself
                branch.add(Text(_said(group), style="dim"))
        _grow(branch, [leaf for leaf in inside if leaf[0]])


def _as_one(name: str, inside: list[Leaf]) -> tuple[str, str] | None:
    """The line of a module and its style, where all in it is one group, or left out for one reason; otherwise None."""
    groups = [group for _, group in inside]
    if len(groups) == 1:
        return f"{'.'.join([name, *inside[0][0]])}  {_said(groups[0])}", "" if groups[0].slices else "dim"
    if {group.kind for group in groups} == {"linear"} or len({(g.kind, g.slices, g.reason) for g in groups}) > 1:
        return None
    layers, weights = sum(group.layers for group in groups), sum(group.weights for group in groups)
    return f"{name}  {_said(replace(groups[0], layers=layers, weights=weights))}", "dim"


def _said(group: Group) -> str:
    size = f"{group.layers} x {group.kind}, {group.weights:,} weights"
    if group.slices:
        return f"{size}: adapted" + (f" as {group.slices} slices each" if group.slices > 1 else "")
    return f"{size}: left out" + ("" if group.kind in group.reason else f", {group.reason}")
