"""The virtual clock: who answers an exchange, when, and what it costs. Decided before training, from counts alone.

Nothing here sleeps or looks at a real clock, so that virtual time is the same for any engine and number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedsim import rng
from fedsim.exchange.payload import Outcome
from fedsim.local.work import Work
from fedsim.system.availability import Always, Presence
from fedsim.system.battery import Batteries, lasting
from fedsim.system.cost import Cost
from fedsim.system.devices import KB, Fleet
from fedsim.system.schedule import Schedule
from fedsim.system.system import System


@dataclass
class RoundTime:
    """What a round took so far: virtual seconds, and joules (NaN where a device's power is not known)."""

    seconds: float = 0.0
    joules: float = 0.0


@dataclass
class Clock:
    """Virtual time of a run, and the devices that make it pass.

    ``facts`` holds for each kind of exchange what a client was last seen to need: units of work per planned sample, and
    bytes up per byte down. From them the time of an answer is predicted before training; what training then took
    sets the clock.
    """

    system: System
    fleet: Fleet
    presence: Presence
    cost: Cost
    seed: int
    memory_mb: float
    now: float = 0.0  # virtual seconds since the run began
    elapsed: RoundTime = field(default_factory=RoundTime)  # in the current round
    facts: dict[str, tuple[float, float]] = field(default_factory=dict)
    batteries: Batteries | None = None  # where devices have any

    @property
    def predicts(self) -> bool:
        """Whether anything depends on when clients answer."""
        system = self.system
        patient = system.stragglers == "wait" and not system.dropout
        return not (patient and isinstance(self.presence, Always) and self.batteries is None)

    @cached_property
    def everybody(self) -> bool:
        """Whether all clients can be asked at any time."""
        roomy = bool((self.fleet.memory >= self.memory_mb).all())
        return isinstance(self.presence, Always) and roomy and self.batteries is None

    def present(self, ids: np.ndarray) -> np.ndarray:
        """Mask (n,) of the clients that can be asked now: they are there, not too low, and the model fits."""
        there = self.presence.until(ids, self.now) > self.now
        if self.batteries is not None:
            there &= ~self.batteries.low(ids, self.now)
        return np.asarray(there & (self.fleet.memory[ids] >= self.memory_mb))

    def plan(
        self,
        works: Mapping[int, Work],
        bytes_down: Sequence[int] | np.ndarray,
        bytes_up: Sequence[int] | np.ndarray | None = None,
        *,
        kind: str,
        round: int,
        number: int = 0,
        wanted: int | None = None,
        trips: int = 1,
    ) -> Schedule:
        """Decide the fate of every client of an exchange that starts now.

        Args:
            works: what each is asked to do, by client id in ascending order.
            bytes_down: size of each one's message (n,).
            bytes_up: size of each one's answer (n,), where it is known; else predicted.
            kind: of exchange; predictions go by it.
            round: with ``number``, the exchange within it, keys the draws.
            wanted: answers after which the others are no longer waited for.
            trips: round trips of the exchange, each of two latencies.
        """
        ids = np.fromiter(works, dtype=np.int64, count=len(works))
        down_bytes = np.asarray(bytes_down, dtype=np.float64)
        units, up_ratio = self.facts.get(kind, (self.cost.gradient, 1.0))
        down_rate, up_rate = (self.rate(way, ids, round, number) for way in ("down", "up"))
        delay = trips * self.fleet.latency[ids] / 1e3
        plan = Schedule(
            ids=ids,
            down=delay + down_bytes / down_rate,
            compute=units / self.fleet.speed[ids] * np.array([w.samples for w in works.values()]),
            up=delay + (up_ratio * down_bytes if bytes_up is None else np.asarray(bytes_up)) / up_rate,
            up_rate=up_rate,
            end=np.zeros(len(ids)),
            bytes_down=np.asarray(bytes_down, dtype=np.int64),
            works=dict(works),
            trips=trips,
        )
        if self.system.stragglers == "partial":
            self._shorten(plan)
        plan.end = plan.down + plan.compute + plan.up
        self._lose(plan, round, number)
        self._cut_late(plan, wanted)
        return plan

    def settle(self, plan: Schedule, outcomes: Sequence[Outcome], kind: str) -> None:
        """What the exchange took, now that training is done: fills in times and energy, ``plan.seconds`` and facts."""
        place = {c: i for i, c in enumerate(plan.ids.tolist())}
        arrivals = [0.0]
        for o in outcomes:
            i = place[o.client]
            if o.kind != "dropped":
                plan.compute[i] = self.cost.units(o.gradients, o.forwards) / self.fleet.speed[o.client]
                plan.up[i] = plan.trips * self.fleet.latency[o.client] / 1e3 + o.bytes_up / plan.up_rate[i]
                plan.end[i] = plan.down[i] + plan.compute[i] + plan.up[i]
                arrivals.append(float(plan.end[i]))
        plan.seconds = max(arrivals)
        if not plan.enough and plan.dropped:
            lost = max(float(plan.end[place[c]]) for c in plan.dropped)
            plan.seconds = max(plan.seconds, lost if self.system.deadline is None else self.system.deadline)
        for o in outcomes:
            i = place[o.client]
            o.sim_seconds = float(min(plan.end[i], plan.seconds))
            o.joules = plan.energy(i, o.sim_seconds, self.fleet)
            self.elapsed.joules += o.joules
        self.drain(outcomes)
        self.learn(kind, outcomes, plan.works)

    def drain(self, outcomes: Sequence[Outcome]) -> None:
        """Take what clients spent from their batteries, and note what is left."""
        if self.batteries is None or not outcomes:
            return
        ids = np.array([o.client for o in outcomes])
        self.batteries.spend(ids, np.array([o.joules for o in outcomes]), self.now)
        for o, left in zip(outcomes, self.batteries.share(ids, self.now).tolist(), strict=True):
            o.battery = left

    def learn(self, kind: str, outcomes: Sequence[Outcome], works: Mapping[int, Work]) -> None:
        """Note what the clients of an exchange of that kind needed."""
        done = [o for o in outcomes if o.kind == "ok"]
        samples, down = sum(works[o.client].samples for o in done), sum(o.bytes_down for o in done)
        if samples and down:
            units = sum(self.cost.units(o.gradients, o.forwards) for o in done)
            self.facts[kind] = units / samples, sum(o.bytes_up for o in done) / down

    def begin_round(self) -> RoundTime:
        """A new round begins now: what it takes will be added up in what is returned."""
        self.elapsed = RoundTime()
        return self.elapsed

    def elapse(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.now += seconds
        self.elapsed.seconds += seconds

    def move(self, to: float, joules: float = 0.0) -> None:
        """Let virtual time pass until then."""
        self.elapsed.seconds += to - self.now
        self.elapsed.joules += joules
        self.now = to

    def save(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        charged = {} if self.batteries is None else {"batteries": self.batteries.save()}
        return {"now": self.now, "facts": {k: list(v) for k, v in self.facts.items()}} | charged

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave."""
        self.now = saved["now"]
        self.facts = {k: (v[0], v[1]) for k, v in saved["facts"].items()}
        if self.batteries is not None:
            self.batteries.restore(saved["batteries"])

    def rate(self, way: str, ids: np.ndarray, round: int, number: int) -> np.ndarray:
        """Bytes per second of this exchange: the client's mean, with its spread, no slower than a tenth of the mean."""
        mean, std = getattr(self.fleet, way)[ids], getattr(self.fleet, f"{way}_std")[ids]
        if std.any():
            draw = rng.normals(self.seed, f"link/{way}", ids, round, number)
            return np.asarray(KB * np.maximum(mean + std * draw, 0.1 * mean))
        return np.asarray(KB * mean)

    def _shorten(self, plan: Schedule) -> None:
        """Give clients that would miss the deadline as many steps as fit, at least one."""
        deadline = self.system.deadline
        assert deadline is not None
        for i in np.flatnonzero(plan.down + plan.compute + plan.up > deadline):
            work = plan.works[int(plan.ids[i])]
            left = deadline - plan.down[i] - plan.up[i]
            if work.steps > 1 and left > 0:
                per_sample = plan.compute[i] / work.samples
                steps = min(work.steps, max(1, int(left / (per_sample * min(work.batch, work.n)))))
                while steps < work.steps and per_sample * work.only(steps + 1).samples <= left:
                    steps += 1  # short last batches leave room
                plan.works[int(plan.ids[i])] = work.only(steps)
                plan.compute[i] = per_sample * work.only(steps).samples

    def _lose(self, plan: Schedule, round: int, number: int) -> None:
        """Who is not there, leaves, or is lost by chance."""
        ids, dropout = plan.ids, self.system.dropout
        stay = self.presence.until(ids, self.now) - self.now
        draws = {
            k: rng.uniforms(self.seed, f"dropout/{k}", ids, round, number)
            for k in ("before", "during", "after")
        }
        share = rng.uniforms(self.seed, "dropout/share", ids, round, number)
        none = np.zeros(len(ids))
        tight = self.fleet.memory[ids] < self.memory_mb
        low, empty = self._power(plan)
        fates = (  # the first that holds counts
            (tight, none, f"lacks the {self.memory_mb:.4g} MB that training takes"),
            (stay <= 0, none, "is not there"),
            (low, none, f"has less than {self.system.battery.threshold:.0%} of its battery"),
            (draws["before"] < dropout.before, none, "lost before training"),
            (draws["during"] < dropout.during, plan.down + share * plan.compute, "lost during training"),
            (draws["after"] < dropout.after, plan.down + plan.compute, "lost after training"),
        )
        decided = np.zeros(len(ids), dtype=bool)
        for holds, at, why in fates:
            for i in np.flatnonzero(holds & ~decided):
                plan.dropped[int(ids[i])], plan.end[i] = why, at[i]
            decided |= holds
        for i in np.flatnonzero(plan.end > empty):
            plan.dropped[int(ids[i])], plan.end[i] = "its battery ran out", empty[i]
        for i in np.flatnonzero(plan.end > stay):
            plan.dropped[int(ids[i])], plan.end[i] = "left before it was done", stay[i]

    def _power(self, plan: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """Mask (n,) of the clients with too little battery, and after how many seconds (n,) the others' is empty.

        What is charged meanwhile is credited afterwards.
        """
        ids, fleet = plan.ids, self.fleet
        if self.batteries is None:
            return np.zeros(len(ids), dtype=bool), np.full(len(ids), np.inf)
        radio, compute = fleet.radio_watts[ids], fleet.compute_watts[ids]
        parts = ((plan.down, radio), (plan.compute, compute), (plan.up, radio))
        return self.batteries.low(ids, self.now), lasting(self.batteries.at(ids, self.now), *parts)

    def _cut_late(self, plan: Schedule, wanted: int | None) -> None:
        """Who misses the deadline, or answers when enough others have."""
        deadline = self.system.deadline
        if deadline is not None:
            for i in np.flatnonzero(plan.end > deadline):
                why = f"missed the deadline of {deadline:g} s (needed {plan.end[i]:.4g} s)"
                plan.dropped.setdefault(int(plan.ids[i]), why)
                plan.end[i] = deadline
        needed = len(plan.ids) if wanted is None else min(wanted, len(plan.ids))
        if len(plan.ids) - len(plan.dropped) >= needed:
            plan.enough = True
            order = sorted(
                (float(e), int(c))
                for e, c in zip(plan.end, plan.ids, strict=True)
                if int(c) not in plan.dropped
            )
            for _, client in order[needed:]:
                plan.dropped[client] = f"came after the first {needed}"
