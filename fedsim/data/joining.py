"""Samples of several participants that are no plain pairs: trees, without targets, or read when they are needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.arrays import Array, array
from fedsim.data.containers import Part
from fedsim.data.dataset import Dataset, Samples, SamplesLike
from fedsim.data.huggingface import Columns
from fedsim.data.labels import TargetRules, targets
from fedsim.data.lazy import Joined, Mapped, Parts, Read, digest
from fedsim.data.readings import remade
from fedsim.data.trees import join, leaves, named_leaves, structure, tree_map
from fedsim.errors import DataError
from fedsim.rng import hash_tensors, undisturbed

LARGE = 1 << 20  # bytes of a participant's inputs from which on they stay where they are

Convert = Callable[[Sequence[Part]], list[Any]]


def admit_trees(
    parts: Sequence[Part], rules: TargetRules, convert: Convert
) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    """Inputs and targets of all participants, leaf by leaf of one type, and the names of the classes if there are any.

    ``convert`` makes inputs of one leaf alike. A participant whose samples are read later gives ``(Read, None)``.

    Raises:
        DataError: where the participants differ; says who and in what.
    """
    kinds = {part.read is not None for part in parts if len(part)}
    if kinds == {True, False}:
        odd = next(p.name for p in parts if p.read is None and len(p))
        raise DataError(f"{odd}: hands over arrays, others data sets; give all of them in one way")
    if True in kinds:
        return _read(parts, rules)
    first = next((p for p in parts if len(p)), parts[0])
    parts = [
        replace(p, x=_ordered(p.x, first.x), y=_ordered(p.y, first.y))
        if len(p)
        else replace(p, x=_emptied(first.x), y=_emptied(first.y))
        for p in parts
    ]
    for part in parts:
        for what, own, wanted in (("x", part.x, first.x), ("y", part.y, first.y)):
            if structure(own) != structure(wanted):
                raise DataError(
                    f"{part.name}: its {what} is made of {_made(own)}, that of {first.name} of {_made(wanted)}"
                )
        for what, tree in (("x", part.x), ("y", part.y)):
            for key, leaf in named_leaves(tree):
                if len(leaf) != len(part):
                    raise DataError(
                        f"{part.name}, {what}{key}: has {len(leaf)} entries for {len(part)} samples"
                    )
    xs = _converted(parts, [p.x for p in parts], convert)
    if all(isinstance(p.y, Array) for p in parts):
        ys, classes = targets([p.name for p in parts], [p.y for p in parts], rules)
        return list(zip(xs, ys, strict=True)), classes
    return list(zip(xs, _converted(parts, [p.y for p in parts], convert), strict=True)), ()


def _ordered(tree: Any, like: Any) -> Any:
    """``tree`` with the names of its dicts in the order of ``like``."""
    if isinstance(tree, dict) and isinstance(like, dict) and tree.keys() == like.keys():
        return {k: _ordered(tree[k], v) for k, v in like.items()}
    if isinstance(tree, tuple | list) and isinstance(like, tuple | list) and len(tree) == len(like):
        return remade(tree, [_ordered(a, b) for a, b in zip(tree, like, strict=True)])
    return tree


def _emptied(tree: Any) -> Any:
    """The same tree without a sample."""

    def empty(leaf: Any) -> Any:
        return leaf[:0] if isinstance(leaf, Array) else torch.empty((0, *leaf.shape[1:]), dtype=leaf.dtype)

    return tree_map(empty, tree)


def _converted(parts: Sequence[Part], trees: Sequence[Any], convert: Convert) -> list[Any]:
    """Trees of one structure with leaves of one type."""
    if trees[0] is None:
        return [None] * len(trees)
    columns = zip(*map(leaves, trees), strict=True)
    names = [key for key, _ in named_leaves(trees[0])]
    made = []
    for key, column in zip(names, columns, strict=True):
        more = key and f", {key}"
        named = [replace(p, name=p.name + more, x=leaf) for p, leaf in zip(parts, column, strict=True)]
        first = next((p for p in named if len(p.x)), named[0])
        for part in named:
            own, wanted = tuple(part.x.shape[1:]), tuple(first.x.shape[1:])
            if len(part.x) and own != wanted:
                raise DataError(f"{part.name}: samples of shape {own}, {first.name} has {wanted}")
        made.append(convert(named))
    spec = structure(trees[0])
    return [torch.utils._pytree.tree_unflatten(list(own), spec) for own in zip(*made, strict=True)]


def _made(tree: Any) -> str:
    names = [key for key, _ in named_leaves(tree)]
    return ", ".join(names) if any(names) else "one array" if names else "nothing"


def _read(parts: Sequence[Part], rules: TargetRules) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    """Data sets with their labels, where each sample has one whole number."""
    with undisturbed():
        ids = [None if part.read is None or rules.own_loss else _ids(part.name, part.read) for part in parts]
    if any(i is None for i in ids):
        return [(part.read, None) for part in parts], ()
    ys, classes = targets([p.name for p in parts], ids, rules)  # type: ignore[arg-type]
    return [
        (replace(p.read, labels=y), None) for p, y in zip(parts, ys, strict=True) if p.read is not None
    ], classes


def _ids(name: str, read: Read | Columns) -> Array | None:
    """The second entry of every sample, if all are single values."""
    if isinstance(read, Columns):
        single: Array | None = read.single(name)
        return single
    if read.labels is not None:
        return read.labels
    found: list[Any] = []
    for row in range(len(read)):
        for item in _row(name, read, row):
            y = item[1] if isinstance(item, tuple | list) and len(item) == 2 else None
            if isinstance(y, Tensor | np.ndarray | np.generic):
                y = y.item() if math.prod(y.shape) == 1 else None
            if not isinstance(y, int | float | str):
                return None
            found.append(y)
    return array(f"{name}, y", found) if found else None


def _row(name: str, read: Read, row: int) -> list[Any]:
    """One sample of a data set, whose own error is told by owner and row."""
    try:
        return read.items([row])
    except Exception as error:  # any of the user's
        said = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{name}, row {row}: cannot be read ({type(error).__name__}: {said})") from error


def together(pairs: Sequence[tuple[Any, Any]]) -> SamplesLike:
    """The samples of several participants one after the other; large inputs stay where they are."""
    reads = [x for x, _ in pairs if isinstance(x, Read | Columns)]
    if len(reads) == 1:
        return reads[0]
    if reads and isinstance(reads[0], Columns):
        from datasets import concatenate_datasets

        parts = [r for r in reads if isinstance(r, Columns)]
        joined, ids = concatenate_datasets([r.data for r in parts]), [r.labels for r in parts]
        every = None if any(y is None for y in ids) else torch.cat([y for y in ids if y is not None])
        return replace(parts[0], data=joined, labels=every)
    if reads:
        labels = [r.labels for r in reads]
        known = None if any(y is None for y in labels) else torch.cat([y for y in labels if y is not None])
        return replace(reads[0], data=Joined([r.data for r in reads]), labels=known)
    x = join(_whole, [x for x, _ in pairs])
    return Samples(x, join(torch.cat, [y for _, y in pairs]))


def _whole(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(p, Mapped) for p in parts):
        return Parts(parts)
    if (whole := _in_place(parts)) is not None:
        return whole
    return torch.cat(list(parts)) if sum(p.nbytes for p in parts) < LARGE * len(parts) else Parts(parts)


def _in_place(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor (n, ...) that ``parts`` are pieces of, one after the other, as a view; ``None`` if they are not."""
    first, end, n = parts[0], parts[0].data_ptr(), 0
    memory = first.untyped_storage().data_ptr() if first.is_cpu else 0
    for part in parts:
        here = part.is_contiguous() and part.data_ptr() == end and part.dtype == first.dtype
        if not (memory and here and part.untyped_storage().data_ptr() == memory):
            return None
        end, n = end + part.nbytes, n + len(part)
    shape = (n, *first.shape[1:])
    return first.as_strided(shape, torch.empty(shape, device="meta").stride(), first.storage_offset())


def content_hash(pairs: Sequence[Any]) -> str:
    """Sha256 of samples as they are handed over: of tensors alone, their bytes in order."""
    plain = all(isinstance(p, tuple) and all(isinstance(t, Tensor) for t in p) for p in pairs)
    if plain:
        return hash_tensors(t for pair in pairs for t in pair)
    found = hashlib.sha256()
    for pair in pairs:
        for tree in _halves_of(pair):
            found.update(
                b"list" if isinstance(tree, list) else b""
            )  # goes to the model in another way than a tuple
            for name, leaf in named_leaves(tree):
                found.update(name.encode())
                for part in leaf.parts if isinstance(leaf, Parts) else (leaf,):
                    own = hash_tensors([part]) if isinstance(part, Tensor) else digest(part)
                    kind = f"{part.dtype}{tuple(part.shape)}" if isinstance(part, Tensor | Mapped) else ""
                    found.update((kind + own).encode())
    return found.hexdigest()


def _halves_of(pair: Any) -> tuple[Any, ...]:
    if isinstance(pair, Dataset):
        return tuple(t for part in (pair.train, pair.test) if part is not None for t in _halves_of(part)) + (
            torch.from_numpy(pair.ids) if pair.ids is not None else None,
        )
    if isinstance(pair, Samples):
        return pair.x, pair.y
    return pair if isinstance(pair, tuple) else (pair,)
