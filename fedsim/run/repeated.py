"""Whether what draws while samples are read or shown draws from what it is given: the same batch twice, before anything
starts. A generator of its own would go on from client to client, and each worker has another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.trees import leaves
from fedsim.data.views import View
from fedsim.data.views.base import seen
from fedsim.engine.draws import theirs
from fedsim.errors import ConfigError
from fedsim.rng import seed_global, undisturbed
from fedsim.run.augmented import check_view
from fedsim.task.outside import changed, noted
from fedsim.task.task import Task

log = logging.getLogger(__name__)

ROWS, TIMES = 8, 4
ADVICE = "torch's, NumPy's or Python's own generators (torch.rand), which are seeded for each client"
GIVEN = f"draw from the generator that it is given, or from {ADVICE}"


def check_views(data: Dataset, views: Mapping[str, View], task: Task, dtype: torch.dtype) -> None:
    """Refuse an augmentation, a view or a data set of the user's that gives another batch for the same samples and
    seeds, and a view that shows what cannot be trained on; say it of one that changes something without another result.

    Raises:
        ConfigError: naming what has changed meanwhile.
    """
    named = {"augment": data.augment, **{f"views.{name}": view for name, view in views.items()}}
    rows = torch.arange(min(ROWS, len(data.train)))
    with undisturbed():
        if len(rows) and not isinstance(data.train, Samples):
            _check("data", [], lambda: data.train.take(rows[:2]), f"draw from {ADVICE}")
        for name, view in named.items():
            if len(rows) and view is not None and theirs(view):
                if name != "augment":
                    check_view(view, data, name, task, dtype)
                _check(name, [view], partial(_shown, view, data, rows), GIVEN)


def _shown(view: View, data: Dataset, rows: Tensor) -> tuple[Any, Any]:
    return seen(view, *data.train.take(rows), torch.Generator().manual_seed(0))


def _check(what: str, things: list[Any], show: Callable[[], Any], advice: str) -> None:
    first, moved = list[Any](), None
    for time in range(TIMES):
        before = noted(things)
        seed_global(0)
        try:
            found = leaves(show())
        except Exception:  # any of the user's: in the run it is named by client
            return
        moved = changed(before, noted(things))
        if time and not _same(first, found):
            raise ConfigError(
                f"{what}: the same samples and seeds give another batch the second time, since "
                f"{moved + ' has changed' if moved else 'it keeps something (a generator of its own?)'}: each worker "
                f"has its own, so results would depend on their number; {advice}"
            )
        first = found
    if moved is not None:
        log.warning(
            "%s: %s changes with each batch, and each worker has its own; if it draws, %s",
            what,
            moved,
            advice,
        )


def _same(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    pairs = [
        (a, b) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)
    ]
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
