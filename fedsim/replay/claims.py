"""What the accounted epsilon of a run says of its canaries: one in or out is not always what it is accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedsim.config.compose import load
from fedsim.exchange.accounting import ADD_REMOVE, REPLACE, ZERO_OUT, Mechanism
from fedsim.exchange.replacing import replaced
from fedsim.run.budgeting import moves

OWNER = (
    "the bound speaks of one client replaced, not of one left out: a sample in or out may change all that its client "
    "sends"
)
FILLED = (
    "the bound speaks of one client replaced, not of one left out: where a canary is out another takes its place; "
    "with exclude_fill=shrink, or participation=bernoulli, nobody does"
)
PRESENCE = (
    "not compared: under privacy=local noise hides what a client sends, not whether there is a client; type "
    "audit.level=sample"
)
SAMPLES = "not compared: under privacy=record noise hides single samples, not whole clients; type audit.level=sample"
UNKNOWN = (
    "not compared: epsilon is accounted for one client left out, a canary in or out is one replaced, and the run, of "
    "an older version, does not say what replacing costs; run it again"
)


@dataclass(frozen=True)
class Claim:
    """``epsilon`` and ``delta`` as accounted, for data sets that differ by ``relation``.

    ``binds``: epsilon, at the same delta, for those that differ in one canary, by the relation ``canary``; None:
    nothing is said of them. ``why``: the two are not the same.
    """

    epsilon: float
    delta: float
    relation: str
    binds: float | None
    canary: str
    why: str = ""

    def entries(self) -> dict[str, Any]:
        """Of a run in ``fedsim audit --json``."""
        return {
            "accounted": self.epsilon,
            "accounted_delta": self.delta,
            "relation": self.relation,
            "compared": self.binds,
            "compared_relation": self.canary,
            "why": self.why,
        }


def said(run: Mapping[str, Any]) -> str:
    """The same in a line."""
    if (compared := run["compared"]) is None:
        return f"accounted {run['accounted']:.2f}, not compared"
    if not run["why"]:
        return f"accounted {compared:.2f}"
    return f"accounted {run['accounted']:.2f} ({run['relation']}), {compared:.2f} under {run['compared_relation']}"


def claim(folder: Path) -> Claim | None:
    """What the run in ``folder`` accounts for; ``None`` if it does not, or what it tells is no bound."""
    try:
        found = json.loads((folder / "summary.json").read_text()).get("privacy")
    except (OSError, ValueError, AttributeError):
        return None
    if not found or not found.get("epsilon_valid") or found.get("epsilon") is None:
        return None
    canary, why = difference(load(folder / "config.yaml"), str(found["level"]))
    eps, delta, relation = float(found["epsilon"]), float(found["delta"]), str(found.get("relation"))
    if not canary:
        return Claim(eps, delta, relation, None, canary, why)
    if canary != REPLACE or relation == REPLACE:  # which is the stronger claim
        return Claim(eps, delta, relation, eps, canary)
    try:
        binds = replaced(Mechanism(**found["mechanism"]), int(found["releases"]), delta)
    except (KeyError, TypeError):
        return Claim(eps, delta, relation, None, canary, UNKNOWN)
    return Claim(eps, delta, relation, binds, canary, why)


def difference(config: DictConfig, level: str) -> tuple[str, str]:
    """The relation of two runs that differ in one canary, empty if privacy of ``level`` has none for it; and why.

    A canary that is a client of its own is left out, unless others take its place; one that is a sample is one record
    more or less, and makes another client of its owner.
    """
    whole = config.audit.level == "client"
    if level == "record":
        return ("", SAMPLES) if whole else (ADD_REMOVE, "")
    if not whole:
        return REPLACE, OWNER
    if level == "local":
        return "", PRESENCE
    filled = config.participation != "bernoulli" and moves(config)
    return (REPLACE, FILLED) if filled else (ZERO_OUT, "")
