"""A data source of a few clients whose samples a test can change, of one client at a time."""

from __future__ import annotations

import numpy as np
import torch
from problems import classes

from fedsim.data.dataset import Dataset, Samples


def source(seed: int, changed: int | None = None, rows: tuple[int, ...] | None = None) -> Dataset:
    """The clients of ``problems.classes``; of client ``changed`` all samples, or ``rows``, are others."""
    clients = classes()
    if changed is not None:
        x, y = (t.clone() for t in clients[changed])
        at = list(range(len(x)) if rows is None else rows)
        x[at], y[at] = 3 * x[at] + 1, (y[at] + 1) % 3
        clients[changed] = (x, y)
    ids = np.concatenate([np.full(len(y), c) for c, (_, y) in enumerate(clients)])
    train = Samples(torch.cat([x for x, _ in clients]), torch.cat([y for _, y in clients]))
    x, y = classes((11,), seed=1)[0]
    return Dataset(train, Samples(x, y), classes=("a", "b", "c"), ids=ids)
