"""What single clients' metrics come to: means, spread, the worst of them, and the same by domain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import ne
from typing import Any

import numpy as np

from fedsim.data.longtail import GROUPS
from fedsim.exchange.payload import Outcome
from fedsim.task.evaluation import over_domains

FAIRNESS = (
    "gini",
    "variance",
    "worst",
    "best_tenth",
    "angle",
    "kl",
)  # columns that ``evaluation.fairness`` adds


def over_clients(
    outcomes: Sequence[Outcome], sizes: np.ndarray, domains: Sequence[str | None] | None = None
) -> dict[str, float]:
    """What single clients' metrics come to: the plain mean of each over the clients that have it; NaN is left out.

    Of perplexities also ``perplexity_pooled``, that of all clients' tokens together, each under its client's model. Of
    accuracies also the mean weighted by training samples ``sizes`` (m,), the population standard deviation over
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
        if metric.rpartition("/")[2] == "perplexity":
            losses, weights = np.log(values), np.array([o.weight for o in having])
            out[f"{metric}_pooled"] = float(np.exp((losses * weights).sum() / max(weights.sum(), 1)))
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
    return out | over_domains({name: means(found) for name, found in members.items()})


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The plain mean of each metric over those that have it; NaN is left out."""
    names = dict.fromkeys(k for o in outcomes for k in o.metrics)
    having = {k: [v for o in outcomes if (v := o.metrics.get(k, math.nan)) == v] for k in names}
    return {k: sum(values) / len(values) if values else math.nan for k, values in having.items()}


def spread_of(values: Sequence[float], *, lower_is_better: bool = False) -> dict[str, float]:
    """How unequal a number is over n clients: ``mean``, ``std`` and ``variance`` (population); ``worst``, and
    ``worst_tenth`` and ``best_tenth``, means of ceil(n / 10) clients; ``gini = sum_ij |x_i - x_j| / (2 n^2 mean)``;
    ``angle`` to (1, .., 1) in degrees; ``kl`` of x / sum x to uniform, in nats (NaN if a number is negative).

    The last three are 0 where all are equal, zeros included.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    n, total, length = len(x), float(x.sum()), float(np.linalg.norm(x))
    worst_first, tenth = x[::-1] if lower_is_better else x, -(-n // 10)
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * total) if total else 0.0
    cosine = min(1.0, total / (math.sqrt(n) * length)) if length else 1.0
    share = x[x > 0] / total if total > 0 else x[:0]
    kl = float((share * np.log(share * n)).sum()) if x[0] >= 0 else math.nan
    return {
        "mean": total / n,
        "std": float(x.std()),
        "variance": float(x.var()),
        "worst_tenth": float(worst_first[:tenth].mean()),
        "best_tenth": float(worst_first[-tenth:].mean()),
        "worst": float(worst_first[0]),
        "gini": gini,
        "angle": math.degrees(math.acos(cosine)),
        "kl": kl,
    }


def fairness(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """``<metric>_<statistic>`` of every metric of single clients, those of ``spread_of`` that ``over_clients`` lacks;
    the worst of losses are the largest. NaN is left out."""
    out: dict[str, float] = {}
    for metric in dict.fromkeys(name for o in outcomes for name in o.metrics):
        values = [v for o in outcomes if (v := o.metrics.get(metric, math.nan)) == v]
        *inside, last = metric.split("/")
        if values and not set(inside) & set(GROUPS):
            found = spread_of(values, lower_is_better=last.endswith("loss"))
            out |= {f"{metric}_{k}": found[k] for k in FAIRNESS}
    return out


def undefined(outcomes: Iterable[Outcome]) -> dict[str, list[int]]:
    """The clients whose metrics are NaN, by metric: what the means leave out."""
    found: dict[str, list[int]] = {}
    for o in outcomes:
        metrics = o.metrics
        if not any(map(ne, metrics.values(), metrics.values())):
            continue
        for name, value in metrics.items():
            if value != value:
                found.setdefault(name if o.task == "fit" else f"{o.task}/{name}", []).append(o.client)
    return found


def uncounted(measured: Mapping[str, Any]) -> str:
    """The measured metrics that are NaN or infinite, by name; what may have none, groups of classes and the
    divergence of clients from each other, is none of them."""
    names = [k for k, v in measured.items() if isinstance(v, float) and not math.isfinite(v)]
    return ", ".join(k for k in names if not k.endswith("_kl") and not set(k.split("/")) & set(GROUPS))
