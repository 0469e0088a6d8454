"""The log of a round, and the row that is made of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import Outcome
from fedsim.server.clientmetrics import uncounted, undefined
from fedsim.tracking.rows import ClientRows

if TYPE_CHECKING:
    from fedsim.system.clock import RoundTime

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass
class RoundLog:
    """What happens in one round, noted while it lasts."""

    outcomes: list[Outcome] = field(default_factory=list)  # of all exchanges
    entries: Row = field(default_factory=dict)  # what the strategy adds to the round's row
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each phase, see ``apart``
    phase: str = ""  # the one under way
    memory: dict[str, Tensor] = field(default_factory=dict)  # see ``Replies``; in the state between rounds
    exchanges: int = 0  # priced so far
    begins: list[int] = field(default_factory=list)  # how many outcomes there were before each exchange
    time: RoundTime | None = None  # virtual, where devices are simulated

    @contextmanager
    def apart(self, phase: str) -> Iterator[None]:
        """What happens in this block is reported under ``phase``, apart from the round: bytes and seconds."""
        outer, self.phase, start = self.phase, phase, time.perf_counter()
        try:
            yield
        finally:
            self.phase = outer
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def heard(self) -> list[int]:
        """Ids of all clients that the method had to do with, ascending."""
        return sorted({o.client for o in self.outcomes if not is_measuring(o.task)})

    def row(
        self, number: int, measured: Row, cohort: Sequence[int], weights_hash: str, started: float
    ) -> Row:
        """The round's row of metrics.jsonl.

        Args:
            number: of the round, from 1.
            measured: what evaluation found.
            cohort: ids of the clients asked.
            weights_hash: of all models after the round.
            started: ``time.perf_counter()`` when the round began; the seconds of phases are not its own.
        """
        fits = [o for o in self.outcomes if o.kind == "ok" and "train_loss" in o.metrics]
        fits = [o for o in fits if o.metrics["train_loss"] == o.metrics["train_loss"]] or fits  # without NaN
        samples = sum(o.samples for o in fits)
        row: Row = {"round": number, **measured}
        if samples:
            row["train_loss"] = sum(o.metrics["train_loss"] * o.samples for o in fits) / samples
        row |= self.entries
        if nan := undefined(o for o in self.outcomes if o.kind == "ok"):
            row["nan"] = nan
            named = "; ".join(f"{k} of client {', '.join(map(str, ids))}" for k, ids in nan.items())
            log.warning("round %d: %s is NaN and left out of means", number, named)
        if names := uncounted(measured):
            log.warning(
                "round %d: %s: no finite number; look at the metric, or whether it counts any sample",
                number,
                names,
            )
        row |= self._traffic("") | self._virtual()
        row |= {
            "seconds": 0.0,
            "cohort": list(cohort),
            "failures": [_failure(o) for o in self.outcomes if o.kind != "ok" and not _unmeasured(o)],
            "weights_hash": weights_hash,
        }
        for phase, seconds in self.phases.items():
            if any(o.phase == phase for o in self.outcomes):
                row[phase] = self._traffic(phase) | {"seconds": seconds}
        row["seconds"] = time.perf_counter() - started - sum(self.phases.values())
        return row

    def client_rows(self, number: int) -> ClientRows:
        """The round's rows of clients.jsonl."""
        values = [(o.client, _numbers(o)) for o in self.outcomes if not _unmeasured(o)]
        return ClientRows(number, values, self._hashes(number))

    def _hashes(self, number: int) -> list[Row]:
        """The round's rows of hashes.jsonl: by exchange and client, where updates are hashed."""
        return [
            {"round": number, "exchange": exchange, "task": o.task, "client": o.client, **o.hashes}
            for exchange, (a, b) in enumerate(pairwise([*self.begins, len(self.outcomes)]))
            for o in self.outcomes[a:b]
            if o.hashes is not None and not is_measuring(o.task)
        ]

    def _traffic(self, phase: str) -> Row:
        """Bytes up and down of one phase of the round; the simulator's own measuring does not count."""
        counted = [o for o in self.outcomes if o.phase == phase and not is_measuring(o.task)]
        return {
            "bytes_up": sum(o.bytes_up for o in counted),
            "bytes_down": sum(o.bytes_down for o in counted),
        }

    def _virtual(self) -> Row:
        """What the round took of virtual time and, where powers are known, of energy; the mean battery left."""
        if self.time is None:
            return {"sim_seconds": None}
        left = [o.battery for o in self.outcomes if o.battery is not None and o.battery == o.battery]
        out = {"sim_seconds": self.time.seconds}
        out |= {} if math.isnan(self.time.joules) else {"joules": self.time.joules}
        return out | ({"battery": math.fsum(left) / len(left)} if left else {})


def _failure(o: Outcome) -> Row:
    """A client that did not contribute."""
    return {"client": o.client, "kind": o.kind, "reason": o.reason, "task": o.task}


def _numbers(o: Outcome) -> dict[str, float]:
    """What is known of one client in one exchange, by metric."""
    values: dict[str, float] = {
        **o.metrics,
        "weight": o.weight,
        "samples": o.samples,
        "bytes_up": o.bytes_up,
        "bytes_down": o.bytes_down,
        "gradients": o.gradients,
        "forwards": o.forwards,
        "seconds": o.seconds,
    }
    for name, value in (("sim_seconds", o.sim_seconds), ("joules", o.joules), ("battery", o.battery)):
        if value is not None and value == value:
            values[name] = value
    return values if o.task == "fit" else {f"{o.task}/{k}": v for k, v in values.items()}


def _unmeasured(o: Outcome) -> bool:
    """A client that had nothing to be measured on: no failure."""
    return o.kind == "refused" and is_measuring(o.task)
