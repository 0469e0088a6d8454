"""Trees: what a batch may be. A tensor, or a dict, tuple or list of trees whose tensors have equal first dimension.

A tensor alone, the common case, never meets the walk over a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any


def tree_map(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """``tree`` with each of its tensors (or what stands for one) changed; ``None`` stays ``None``."""
    if isinstance(tree, Tensor):
        return change(tree)
    return None if tree is None else pytree.tree_map(change, tree)


def leaves(tree: Tree) -> list[Any]:
    """The tensors of ``tree``, or what stands for them, in its order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [] if tree is None else pytree.tree_leaves(tree)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """The same with names for messages, such as ``['input_ids']``; a tensor alone has none."""
    if isinstance(tree, Tensor):
        return [("", tree)]
    return (
        []
        if tree is None
        else [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_leaves_with_path(tree)]
    )


def structure(tree: Tree) -> Any:
    """What two trees must share to be put together."""
    return None if tree is None else pytree.tree_structure(tree)


def size(tree: Tree) -> int:
    """First dimension of its first tensor; 0 without any."""
    if isinstance(tree, Tensor):
        return tree.shape[0]
    return next((len(leaf) for leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def join(put: Callable[[Any], Any], trees: Sequence[Tree]) -> Tree:
    """One tree of several of one structure: ``put`` (``torch.stack``, ``torch.cat``) makes one tensor of theirs."""
    if isinstance(trees[0], Tensor):
        return put(trees)
    if trees[0] is None:
        return None
    spec = pytree.tree_structure(trees[0])
    return pytree.tree_unflatten([put(parts) for parts in zip(*map(leaves, trees), strict=True)], spec)


def shapes(tree: Tree) -> tuple[Any, ...]:
    """Shapes of its tensors, in order."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape)
    return tuple(tuple(leaf.shape) for leaf in leaves(tree))


def pieces(tree: Tree, size: int) -> Sequence[Tree]:
    """Batches of ``size`` (the last may be short), as views."""
    if isinstance(tree, Tensor):
        return tree.unsafe_split(size)
    parts = [leaf.unsafe_split(size) for leaf in leaves(tree)]
    spec = pytree.tree_structure(tree)
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def in_dtype(tree: Tree, dtype: torch.dtype) -> Tree:
    """``tree`` with its floats in ``dtype``; whole numbers and flags stay."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def widened(t: Tensor) -> Tensor:
    """Whole numbers that torch looks nothing up by (int8, int16) as int64."""
    return t.long() if t.dtype in (torch.int8, torch.int16) else t


def as_ids(t: Any) -> Any:
    """Whole numbers with a sign as int64, in which torch takes classes; bytes, flags and floats stay."""
    return t.long() if isinstance(t, Tensor) and t.dtype in (torch.int8, torch.int16, torch.int32) else t
