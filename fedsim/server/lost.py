"""Rounds in which no update of any client counted, and runs that are made of such rounds alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.errors import ThinRoundError, headline
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import Outcome

NOBODY = "no update counted: "  # begins what the row of such a round says, if a client was at fault
# Begin why a sum of too few is void.
NOT_ENOUGH = ("secure aggregation is void: ", "privacy.where=distributed: ")
SAID = {
    "nonfinite": "not finite",
    "failed": "failed",
    "dropped": "dropped out",
    "refused": "had nothing to send",
    "void": "in a sum of too few",
}


def void(outcome: Outcome) -> bool:
    """Whether a client answered in vain: fewer than masks or noise in shares need came with it."""
    return outcome.kind == "dropped" and outcome.reason.startswith(NOT_ENOUGH)


def lost(outcomes: Iterable[Outcome]) -> str:
    """What became of an exchange of a round whose every update was lost; empty if there is none.

    Clients that all have nothing to send, and an empty cohort, are no loss.
    """
    tasks: dict[str, list[Outcome]] = {}
    for o in outcomes:
        tasks.setdefault(o.task, []).append(o)
    for task, found in tasks.items():
        if is_measuring(task) or any(o.kind == "ok" for o in found):
            continue
        kinds = Counter("void" if void(o) else o.kind for o in found)
        if kinds.keys() == {"refused"}:
            continue
        counted = ", ".join(f"{kinds[kind]} {said}" for kind, said in SAID.items() if kinds[kind])
        first = next((o for o in found if o.kind in ("nonfinite", "failed")), None)
        if first is None:
            return next((o.reason for o in found if void(o)), f"nobody answered: {counted}")
        return f"{NOBODY}{counted} (client {first.client}: {headline(first.reason)})"
    return ""


def check_moved(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to call a run done in which no update of any client counted, by clients' fault. One round is a trial,
    whose row and warnings say it.

    Raises:
        ThinRoundError: naming the first.
    """
    said = [str(row.get("thin_round", "")) for row in rows]
    if len(rows) > 1 and all(text.startswith((NOBODY, "nobody answered: ", *NOT_ENOUGH)) for text in said):
        first = next(
            ((row["round"], t) for row, t in zip(rows, said, strict=True) if t.startswith(NOBODY)), None
        )
        if first is not None:
            raise ThinRoundError(
                f"no update of any client counted in any of the {len(rows)} rounds, so the model learned nothing from "
                f"them; round {first[0]}: {first[1]}"
            )
