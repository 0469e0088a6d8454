"""What single clients' metrics come to: means, spread, the worst of them, and the same by domain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedsim.data.longtail import GROUPS
from fedsim.exchange.payload import Outcome
from fedsim.task.evaluation import over_domains


def over_clients(
    outcomes: Sequence[Outcome], sizes: np.ndarray, domains: Sequence[str | None] | None = None
) -> dict[str, float]:
    """What single clients' metrics come to: the plain mean of each over the clients that have it; NaN is left out.

    Of accuracies also the mean weighted by training samples ``sizes`` (m,), the population standard deviation over
    clients, and the mean of the worst tenth of them (at least one client). With ``domains``, the name of
    every client's, also the plain means by domain (see ``over_domains``).
    """
    out: dict[str, float] = {}
    for metric in dict.fromkeys(name for o in outcomes for name in o.metrics):
        having = [o for o in outcomes if (v := o.metrics.get(metric, math.nan)) == v]
        if not having:
            out[metric] = math.nan
            continue
        values = np.array([o.metrics[metric] for o in having])
        out[metric] = float(values.mean())
        *inside, last = metric.split("/")
        if last == "accuracy" and not set(inside) & set(GROUPS):
            weights = np.array([sizes[o.client] for o in having], dtype=np.float64)
            out[f"{metric}_weighted"] = float((values * weights).sum() / max(weights.sum(), 1))
            out[f"{metric}_std"] = float(values.std())
            out[f"{metric}_worst_tenth"] = float(np.sort(values)[: -(-len(values) // 10)].mean())
    members: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if domains is not None and (name := domains[o.client]) is not None:
            members.setdefault(name, []).append(o)
    return out | over_domains({name: _means(found) for name, found in members.items()})


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    names = dict.fromkeys(k for o in outcomes for k in o.metrics)
    having = {k: [v for o in outcomes if (v := o.metrics.get(k, math.nan)) == v] for k in names}
    return {k: sum(values) / len(values) if values else math.nan for k, values in having.items()}


def undefined(outcomes: Iterable[Outcome]) -> dict[str, list[int]]:
    """The clients whose metrics are NaN, by metric: what the means leave out."""
    found: dict[str, list[int]] = {}
    for o in outcomes:
        for name, value in o.metrics.items():
            if value != value:
                found.setdefault(name if o.task == "fit" else f"{o.task}/{name}", []).append(o.client)
    return found
