"""Arrays or tensors, or tuples, named tuples and dictionaries of them at any depth: states and observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""An array or a tensor, or a tuple, named tuple or dictionary of trees."""


def tree_map(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """A tree of the same structure, of what `change` makes of the leaves that stand in the same place of each tree."""
    if isinstance(tree, dict):
        return {key: tree_map(change, part, *(other[key] for other in others)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [tree_map(change, *of_each) for of_each in zip(tree, *others, strict=True)]
        return tree._make(parts) if hasattr(tree, "_make") else tuple(parts)
    return change(tree, *others)


def tree_leaves(tree: Tree) -> list[Any]:
    """All leaves, in the order in which `tree_map` comes to them."""
    leaves: list[Any] = []
    tree_map(leaves.append, tree)
    return leaves
