"""A client's samples as batches: one gather per block of batches, no loader, no per-sample Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.data import trees
from fedsim.data.dataset import Augment, Normalize, SamplesLike
from fedsim.data.trees import Tree, as_ids, in_dtype, pieces, tree_map, widened
from fedsim.data.views.base import seen

BLOCK = 1 << 22  # numbers gathered at once (16 MiB of float32)


class Batch(NamedTuple):
    """Model input ``x`` and target ``y``, each a tensor (B, ...) or a tree of such; with several clients at once,
    (C, B, ...). ``y`` is ``None`` where there are no targets."""

    x: Tree
    y: Tree = None

    @property
    def size(self) -> int:
        """Samples in it."""
        x = self.x
        return x.shape[0] if isinstance(x, Tensor) else trees.size(x)


class Collated(Batch):
    """A batch that somebody's ``collate_fn`` made: its tensors need not have an entry per sample."""

    samples: int

    @property
    def size(self) -> int:
        """Samples in it."""
        return self.samples


def copied(batch: Batch) -> Batch:
    """A batch with tensors of its own, for code that may write to them."""
    x, y = (tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, part) for part in batch)
    if not isinstance(batch, Collated):
        return Batch(x, y)
    out = Collated(x, y)
    out.samples = batch.samples
    return out


@dataclass(frozen=True)
class LocalData:
    """Rows ``index`` (n,) int64 of a shared data set, read in the run's dtype on the run's device."""

    samples: SamplesLike
    index: Tensor
    dtype: torch.dtype
    normalize: Normalize | None = None
    augment: Augment | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def read(self, rows: Tensor, rng: torch.Generator | None = None) -> Batch:
        """Gather positions ``rows`` of this client's samples; augmented when ``rng`` is given. Fresh tensors."""
        samples = self.samples
        x, y = samples.take(self.index.index_select(0, rows))
        if rng is not None and self.augment is not None:
            x, y = seen(self.augment, x, y, rng)
        x = prepare(x, self.dtype, self.normalize)
        y = tree_map(as_ids, in_dtype(y, self.dtype))
        if samples.sliceable:
            return Batch(x, y)
        batch = Collated(x, y)
        batch.samples = len(rows)
        return batch

    def everything(self) -> Batch:
        """All samples in partition order, not augmented."""
        return self.read(torch.arange(len(self)))

    def blocks(
        self,
        batch_size: int,
        *,
        epochs: int,
        steps: int | None,
        shuffle: bool,
        rng: torch.Generator,
        smallest: int = 1,
    ) -> Iterator[Iterable[Batch]]:
        """Mini-batches of ``epochs`` passes, or exactly ``steps`` of them, in blocks that are gathered at once.

        The last of a pass may be short, and is left out if it has fewer than ``smallest`` samples. Order and
        augmentation come from ``rng`` alone.
        """
        n = len(self)
        per_epoch = batches_per_epoch(n, batch_size, smallest)
        left = steps if steps is not None else epochs * per_epoch
        samples, block = self.samples, batch_size
        if samples.sliceable:
            block *= max(1, BLOCK // (max(1, getattr(samples, "width", 1)) * batch_size))
        draw = rng if self.augment is not None else None
        while left > 0 and per_epoch:
            order = torch.randperm(n, generator=rng) if shuffle else torch.arange(n)
            if min(left, per_epoch) * batch_size < n:
                order = order[: min(left, per_epoch) * batch_size]
            for rows in torch.split(order, block) if n > block else (order,):
                batch = self.read(rows, draw)
                x, y = batch
                if not samples.sliceable:
                    yield (batch,)
                elif y is None:
                    yield map(Batch, pieces(x, batch_size))
                else:
                    yield map(Batch, pieces(x, batch_size), pieces(y, batch_size))
            left -= min(left, per_epoch)


def prepare(x: Tree, dtype: torch.dtype, normalize: Normalize | None) -> Tree:
    """Raw batch to model input: normalised, floats and bytes in ``dtype``, integer tokens untouched."""
    if not isinstance(x, Tensor):
        y = x.get("labels") if isinstance(x, dict) else None
        if isinstance(y, Tensor):  # of a model that works out its own loss
            x = {**x, "labels": y.long() if y.dim() == 1 and y.dtype == torch.uint8 else as_ids(y)}
        return tree_map(lambda t: prepare(widened(t), dtype, None) if isinstance(t, Tensor) else t, x)
    if normalize is not None:
        return normalize(x, dtype)
    return x.to(dtype) if x.is_floating_point() or x.dtype == torch.uint8 else x


def batches_per_epoch(n: int, batch_size: int, smallest: int = 1) -> int:
    """Batches of at least ``smallest`` samples in one pass over ``n``."""
    return n // batch_size * (batch_size >= smallest) + (n % batch_size >= smallest)
