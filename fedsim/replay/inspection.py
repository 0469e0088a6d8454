"""Audits of clients: what each one's updates look like, for which nothing is trained anew, and what it is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.assignments import Broadcast, Plan
from fedsim.engine.worker import Worker
from fedsim.errors import ConfigError
from fedsim.exchange.fold import Folder
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import Outcome, Update
from fedsim.local.job import Job
from fedsim.replay.again import Stop, computed, weights_hashes
from fedsim.replay.variants import BaseRun
from fedsim.replay.worth import Valuing, find
from fedsim.rng import hash_tensors
from fedsim.server.collusion import ATTACKERS
from fedsim.task.layout import Layout


@dataclass
class ClientSeen:
    """What was seen of one client's updates."""

    cosines: list[float] = field(default_factory=list)  # with the mean of the others of its round
    ratios: list[float] = field(default_factory=list)  # of its norm to the mean norm of the others
    reasons: dict[str, int] = field(default_factory=dict)  # of a free rider, and the first round of each
    hashes: dict[str, int] = field(default_factory=dict)  # of its updates so far, and their round

    def note(self, reason: str, round: int) -> None:
        """A reason to take it for a free rider."""
        self.reasons.setdefault(reason, round)


class Inspector:
    """Looks at the updates of a serial run, round by round."""

    def __init__(self, stop: Stop):
        self.stop, self.clients = stop, dict[int, ClientSeen]()
        self._round = 0
        self._updates: list[tuple[int, Tensor]] = []

    def worker(self, plan: Plan) -> Worker:
        """A worker whose clients are looked at."""
        return _Inspected(plan, self)

    def update(
        self, client: int, sent: Mapping[str, Tensor], got: Mapping[str, Tensor], layout: Layout
    ) -> None:
        """The flat vector that ``client`` sent, its ``delta`` if it has one of that name."""
        if self.stop.now != self._round:
            self.finish()
            self._round = self.stop.now
        names = [n for n in sorted(sent, key=lambda n: n != "delta") if layout.params.holds(sent[n])]
        if not names or sent[names[0]].dim() != 1:
            return
        vector = layout.params.compact(sent[names[0]].detach()).clone()
        seen, digest = self.clients.setdefault(client, ClientSeen()), hash_tensors([vector])
        if not vector.any():
            seen.note("zero update", self._round)
        elif any(_is(t, vector, layout) for t in got.values()):
            seen.note("sends what it was sent", self._round)
        elif seen.hashes.get(digest, self._round) < self._round:
            seen.note(f"the update of round {seen.hashes[digest]} again", self._round)
        seen.hashes.setdefault(digest, self._round)
        for other, theirs in self._updates:
            if other != client and vector.any() and torch.equal(theirs, vector):
                seen.note(f"the update of client {other}", self._round)
                self.clients[other].note(f"the update of client {client}", self._round)
        self._updates.append((client, vector))

    def finish(self) -> None:
        """The round's updates are all there: each against the others."""
        updates = dict(self._updates)  # the last attempt of each
        self._updates = []
        if len(updates) < 2:
            return
        vectors = {c: v.double() for c, v in updates.items()}
        total = torch.stack(list(vectors.values())).sum(0)
        norms = {c: float(v.norm()) for c, v in vectors.items()}
        for c, v in vectors.items():
            rest, others = total - v, fmean(n for k, n in norms.items() if k != c)
            scale = norms[c] * float(rest.norm())
            if scale > 0:
                self.clients[c].cosines.append(float(v @ rest) / scale)
            if others > 0:
                self.clients[c].ratios.append(norms[c] / others)


def _is(t: Tensor, vector: Tensor, layout: Layout) -> bool:
    return t.dim() == 1 and layout.params.holds(t) and torch.equal(layout.params.compact(t), vector)


class _Inspected(Worker):
    def __init__(self, plan: Plan, inspector: Inspector):
        super().__init__(plan)
        self._inspector = inspector

    def _accept(
        self, job: Job, update: Update, broadcast: Broadcast, folder: Folder, outcome: Outcome
    ) -> dict[str, Tensor] | None:
        if not is_measuring(broadcast.task):
            sent = update.payload.arrays
            self._inspector.update(outcome.client, sent, job.message.arrays, self.model.layout)
        return super()._accept(job, update, broadcast, folder, outcome)


def inspect(base: BaseRun) -> dict[int, ClientSeen]:
    """The run computed once more, serially, with an eye on every update.

    Raises:
        ConfigError: if that does not give the weights that were recorded.
    """
    then = weights_hashes(base.dir)
    stop = Stop(0)  # never ends it
    inspector = Inspector(stop)
    with computed(base.dir, stop, inspector.worker) as result:
        now = {r["round"]: r["weights_hash"] for r in result.rows}
    inspector.finish()
    if bad := next((t for t in then if now.get(t) != then[t]), None):
        raise ConfigError(
            f"{base.dir}: round {bad} came out with other weights than it was recorded with, so what is seen is not "
            "what happened; fedsim verify says more"
        )
    return inspector.clients


def audit(
    base: BaseRun, valuing: Valuing | None = None, workers: int = 1, say: Any = print
) -> dict[str, Any]:
    """A row a client, as ``fedsim audit --clients --json`` prints them; with leave-one-out values by ``valuing``."""
    seen = inspect(base)
    valued = find(valuing, workers, say) if valuing is not None else None
    worth = {int(p["name"]): p for p in valued["players"]} if valued else {}
    rounds = [row.get("cohort") or [] for row in base.rows]
    attackers = _attackers(base.dir)
    rows = []
    for client in base.clients:
        found, value = seen.get(client, ClientSeen()), worth.get(client)
        flags = ["free rider"] if found.reasons else []
        verdict = value["verdict"] if value else None
        flags += {"worse": ["harmful"], "equivalent": ["redundant"]}.get(verdict or "", [])
        rows.append(
            {
                "client": client,
                "rounds": sum(client in cohort for cohort in rounds),
                "cosine": _mean(found.cosines),
                "norm_ratio": _mean(found.ratios),
                "value": value and {k: value[k] for k in ("value", "low", "high", "p", "verdict")},
                "flags": flags,
                "reasons": [f"{why} (round {at})" for why, at in found.reasons.items()],
                "attacker": None if attackers is None else client in attackers,
            }
        )
    out: dict[str, Any] = {"run": str(base.dir), "clients": rows}
    if valued:
        out |= {k: valued[k] for k in ("objective", "seeds", "runs")}
    if attackers is not None:
        out["confusion"] = confusion(rows)
    return out


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Planted attackers against those flagged as free riders or harmful."""
    bad = [(bool({"free rider", "harmful"} & set(row["flags"])), bool(row["attacker"])) for row in rows]
    return {
        "attackers_flagged": bad.count((True, True)),
        "attackers_missed": bad.count((False, True)),
        "others_flagged": bad.count((True, False)),
        "others_passed": bad.count((False, False)),
    }


def table(found: Mapping[str, Any], scale: float) -> Iterator[str]:
    """The lines of ``fedsim audit --clients``; values times ``scale``."""
    valued = any(row["value"] for row in found["clients"])
    head = f"{'client':>6} {'rounds':>6} {'cosine':>7} {'norm':>6}"
    yield head + (f" {'value':>8} {'interval':>18}" if valued else "") + "  flags"
    for row in found["clients"]:
        line = (
            f"{row['client']:>6} {row['rounds']:>6} {_text(row['cosine'], 7)} {_text(row['norm_ratio'], 6)}"
        )
        if valued:
            v = row["value"]
            span = "" if v["low"] is None else f"[{scale * v['low']:+.2f}, {scale * v['high']:+.2f}]"
            line += f" {scale * v['value']:>+8.2f} {span:>18}"
        yield f"{line}  {', '.join(row['flags'])}{': ' if row['reasons'] else ''}{'; '.join(row['reasons'])}".rstrip()
    if "confusion" in found:
        yield "planted attackers: " + ", ".join(
            f"{n} {k.replace('_', ' ')}" for k, n in found["confusion"].items()
        )


def _attackers(folder: Path) -> set[int] | None:
    file = folder / ATTACKERS
    return set(json.loads(file.read_text())) if file.is_file() else None


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return fmean(finite) if finite else None


def _text(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None or not math.isfinite(value) else f"{value:>{width}.2f}"
