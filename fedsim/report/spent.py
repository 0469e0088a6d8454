"""What runs say of their privacy: epsilon as accounted, delta, whether it is a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.report.runs import Run

EPSILON, DELTA = "epsilon_spent", "at_delta"  # columns of the table of results
COINS = "cohorts of fixed size, accounted as coins"
SHARES = "sums of rounded noise, accounted as one Gaussian"


def spent(run: Run) -> Mapping[str, Any] | None:
    """What a run says of its privacy: its summary, else its last row; None: there is none to speak of."""
    if run.until is None and (found := run.summary.get("privacy")):
        return dict(found)
    last = next((row for row in reversed(run.rows) if row.get("epsilon") is not None), None)
    return None if last is None else last


def spent_most(runs: Sequence[Run]) -> dict[str, float]:
    """The two columns of an arm: the largest epsilon of its runs, and delta; NaN where they have no budget."""
    found = [one for run in runs if (one := spent(run)) and one.get("epsilon") is not None]
    return {
        EPSILON: max((float(one["epsilon"]) for one in found), default=math.nan),
        DELTA: max((float(one["delta"]) for one in found), default=math.nan),
    }


def no_bound(runs: Sequence[Run]) -> str:
    """Why some epsilon of these runs is no bound; empty where all are."""
    found = [run for run in runs if (one := spent(run)) is not None and not one.get("epsilon_valid", True)]
    shared = [run.settings.get("privacy.where") == "distributed" for run in found]
    assumed = [bool(run.settings.get("privacy.assume_poisson")) for run in found]
    coins = any(a or not s for a, s in zip(assumed, shared, strict=True))
    return "; ".join([COINS] * coins + [SHARES] * any(shared))
