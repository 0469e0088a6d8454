"""Whether a metric of parts, put together, is the metric of the whole: tried on samples before anything starts."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor

from fedsim.data.trees import leaves, tree_map
from fedsim.errors import ConfigError
from fedsim.task.metrics import Counted

TOLERANCE = 1e-6  # relative: states are kept in float64, and some metrics compute in float32


def check_merging(name: str, counted: Counted, output: Any, y: Any) -> None:
    """Refuse a torchmetrics object that gives another value over two parts than over the whole of ``output`` and ``y``.

    Raises:
        ConfigError: also where it keeps a number outside of its states, which other workers would not see.
    """
    n = min((len(t) for t in leaves((output, y))), default=0)
    if n < 2:
        return
    whole, kept = copy.deepcopy(counted.metric), _numbers(counted.metric)
    whole.update(output, y)
    if moved := [k for k, v in _numbers(whole).items() if k not in kept or _differ(v, kept[k])]:
        raise ConfigError(
            f"metrics: {name!r} ({type(counted.metric).__name__}) keeps {moved[0]!r} outside of its states, where "
            f"other workers do not see it; type self.add_state({moved[0]!r}, ..., dist_reduce_fx='sum')"
        )
    pair = (output, y)
    halves = [tree_map(lambda t: t[: n // 2], pair), tree_map(lambda t: t[n // 2 :], pair)]
    first, second = (copy.deepcopy(counted)(*half) for half in halves)
    found, once = counted.value(first + second), counted.value(first)
    wanted = counted.named(given := whole.compute())
    if isinstance(given, tuple | list) and once.keys() != wanted.keys():
        raise ConfigError(
            f"metrics: {name!r} ({type(counted.metric).__name__}) gives curves, {len(once)} numbers for {n // 2} "
            f"samples and {len(wanted)} for {n}, so there is no column for each; give one of a fixed "
            "size (thresholds=10), or the area under it"
        )
    if found.keys() != wanted.keys() or any(_differ(found[k], wanted[k]) for k in wanted):
        raise ConfigError(
            f"metrics: {name!r} ({type(counted.metric).__name__}) is {_shown(found)} put together from two parts, and "
            f"{_shown(wanted)} over the whole; give one that can be put together, or a function that returns "
            "(sum, count)"
        )


def _numbers(metric: Any) -> dict[str, Any]:
    """Numbers that a metric keeps as plain attributes, its own bookkeeping aside."""
    return {
        k: v
        for k, v in vars(metric).items()
        if not k.startswith("_")
        and k not in metric._reductions
        and isinstance(v, int | float | Tensor)
        and not isinstance(v, bool)
    }


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is not b and (not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.equal(b))
    return not (math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (a != a and b != b))


def _shown(values: Any) -> str:
    return ", ".join(f"{v:.4g}" for v in values.values())
