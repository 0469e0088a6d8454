"""The round loop: sample, let the strategy work, measure, record, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedsim.config.schema import CheckpointConfig, EvaluationConfig
from fedsim.errors import CheckpointError
from fedsim.exchange.payload import Outcome
from fedsim.rng import hash_tensors
from fedsim.server import checkpoint
from fedsim.server.exchanges import BESIDE, MEASURING, Server
from fedsim.server.round import Round
from fedsim.server.traits import State, StrategyLike
from fedsim.system.clock import Lap
from fedsim.task.vectors import Weights
from fedsim.tracking.base import Tracker
from fedsim.tracking.rows import ClientRows

Row = dict[str, Any]


@dataclass
class Loop:
    """One run: everything it needs, and its progress."""

    strategy: StrategyLike
    server: Server
    trackers: Tracker
    rounds: int
    clients_per_round: int
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig
    folder: Path
    key: str
    cohorts: Sequence[Sequence[int]] | None = None
    state: State = field(default_factory=dict)
    done: int = 0  # finished rounds
    saved: int = -1  # finished rounds in the newest checkpoint
    beside: Row = field(default_factory=dict)  # what the simulator itself carries from round to round
    torn: bool = False  # interrupted between two rounds: only the newest checkpoint can be trusted
    history: list[Row] = field(default_factory=list)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint."""
        found = checkpoint.load(path, self.key)
        self.state, self.done, self.saved = found.state, found.rounds, found.rounds
        self.server.states.restore(found.clients)
        self.beside = {k: self.state.pop(k) for k in list(self.state) if k.startswith(BESIDE)}
        self.server.restore(self.beside)

    def run(self) -> None:
        """All remaining rounds. If one fails or is interrupted, the last finished round is checkpointed first.

        A round is finished once it has been measured; if it was not, it is done again on resumption.
        """
        if not self.state:
            self.state = self.strategy.init(self.server)
        try:
            while self.done < self.rounds:
                self._round()
            self.save()
        except BaseException as e:
            self.server.states.discard()
            try:
                if self.done and not self.torn:
                    self.save()
            except Exception as lost:
                e.add_note(f"The last finished round could not be checkpointed either: {lost}")
            raise

    def save(self) -> None:
        """Checkpoint the last finished round, unless that is done."""
        if self.saved != self.done:
            state, folder = self.state | self.beside, self.folder / "checkpoint"
            try:
                checkpoint.save(folder, self.done, state, self.server.states, self.key)
            except (OSError, SafetensorError) as e:
                kept = f"round {self.saved} is still there" if self.saved > 0 else "there is none before it"
                raise CheckpointError(
                    f"the checkpoint of round {self.done} could not be written to {folder} ({e}); {kept}. "
                    "Make room and type the same command again: it goes on from there"
                ) from e
            self.saved = self.done

    def models(self) -> Mapping[str, Weights]:
        """The models of the current state."""
        return self.strategy.models(self.state)

    def _round(self) -> None:
        started, server, index = time.perf_counter(), self.server, self.done
        server.outcomes, server.log, server.phases, server.exchanges = [], {}, {}, 0
        if server.clock:
            server.clock.lap = Lap()
        wanted = None if self.cohorts is not None else self.clients_per_round
        start = Round(index, (), server.num_clients, server.seed, server.local, wanted)
        server.current = start
        ids = self._cohort(index)
        server.current = replace(start, cohort=ids)
        state = self.strategy.round(server, self.state, server.current)
        if self.strategy.traits.asynchronous:
            ids = sorted({o.client for o in server.outcomes if o.task not in MEASURING})
        elif server.clock and not ids:
            server.clock.elapse(server.clock.system.idle)
        self._observe(index)
        row, clients = self._row(state, ids, index, started)
        self.torn = True  # until the step is through, memory holds neither the old round nor the new one
        server.states.accept()
        self.state, self.done = state, index + 1
        self.beside = server.save()
        self.torn = False
        self.history.append(row)
        self.trackers.round(row, clients)
        if self._reached(row):
            self.rounds = self.done
        if self.checkpoints.every and self.done % self.checkpoints.every == 0:
            self.save()

    def _cohort(self, index: int) -> Sequence[int]:
        """Who is asked in a round; more clients than needed where the fleet's settings say so."""
        if self.strategy.traits.asynchronous:
            return []
        if self.cohorts is not None:
            return self.cohorts[index]
        self.server.population.measure = self._losses
        clock = self.server.clock
        asked = math.ceil(self.clients_per_round * (clock.system.over_selection if clock else 1))
        return self.server.sample(min(asked, self.server.num_clients), index)

    def _losses(self, clients: Sequence[int], task: str = "losses") -> dict[int, Mapping[str, Any]]:
        """Losses on clients' training samples of the model that the round starts from."""
        return self.server.losses(self.models()["global"], clients, task)

    def _observe(self, index: int) -> None:
        """Let the sampling rule see what the round's clients were like."""
        if not self.server.sampler.remembers:
            return
        outcomes, losses = self.server.outcomes, None
        if self.server.sampler.wants_squares:
            told = {o.client for o in outcomes if o.kind == "ok" and "train_loss" in o.metrics}
            losses = {c: v["loss_rms"] for c, v in self._losses(sorted(told), "utility").items()}
        self.server.population.observe(index, outcomes, losses)

    def _reached(self, row: Row) -> bool:
        target = self.evaluation.target
        return self.evaluation.stop_at_target and target is not None and row.get("accuracy", -1.0) >= target

    def _measure(self, state: State, index: int) -> Row:
        """Metrics of every model on the test set and, when due, on the clients' held-out parts."""
        out: Row = {}
        plan, last = self.evaluation, index + 1 == self.rounds
        if last or (plan.every and (index + 1) % plan.every == 0):
            out |= self.strategy.evaluate(self.server, state)
        if plan.clients_every and (last or (index + 1) % plan.clients_every == 0):
            found = self.strategy.evaluate_clients(self.server, state)
            out |= {f"clients/{name}": value for name, value in found.items()}
        return out

    def _row(self, state: State, ids: Sequence[int], index: int, started: float) -> tuple[Row, ClientRows]:
        measured, outcomes = self._measure(state, index), self.server.outcomes
        fits = [o for o in outcomes if o.kind == "ok" and "train_loss" in o.metrics]
        samples = sum(o.samples for o in fits)
        models = self.strategy.models(state)
        row: Row = {"round": index + 1, **measured}
        if samples:
            row["train_loss"] = sum(o.metrics["train_loss"] * o.samples for o in fits) / samples
        row |= self.server.log
        row |= _traffic(outcomes, "") | {
            **self._virtual(),
            "seconds": time.perf_counter() - started,
            "cohort": list(ids),
            "failures": [failure(o) for o in outcomes if o.kind != "ok" and not _unmeasured(o)],
            "weights_hash": hash_tensors(t for name in sorted(models) for t in models[name]),
        }
        for phase, seconds in self.server.phases.items():
            if not any(o.phase == phase for o in outcomes):
                continue
            row[phase] = _traffic(outcomes, phase) | {"seconds": seconds}
        row["seconds"] = time.perf_counter() - started - sum(self.server.phases.values())
        return row, ClientRows(index + 1, [(o.client, told(o)) for o in outcomes if not _unmeasured(o)])

    def _virtual(self) -> Row:
        """What the round took of virtual time and, where powers are known, of energy; the mean battery left."""
        if self.server.clock is None:
            return {"sim_seconds": None}
        lap = self.server.clock.lap
        left = [o.battery for o in self.server.outcomes if o.battery is not None and o.battery == o.battery]
        out = {"sim_seconds": lap.seconds} | ({} if math.isnan(lap.joules) else {"joules": lap.joules})
        return out | ({"battery": math.fsum(left) / len(left)} if left else {})


def _traffic(outcomes: Sequence[Outcome], phase: str) -> Row:
    """Bytes up and down of one phase of a round; the simulator's own measuring does not count."""
    counted = [o for o in outcomes if o.phase == phase and o.task not in MEASURING]
    return {"bytes_up": sum(o.bytes_up for o in counted), "bytes_down": sum(o.bytes_down for o in counted)}


def failure(o: Outcome) -> Row:
    """A client that did not contribute, for the log."""
    return {"client": o.client, "kind": o.kind, "reason": o.reason, "task": o.task}


def told(o: Outcome) -> dict[str, float]:
    """What the log tells of one outcome: numbers by metric."""
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
    return o.task in MEASURING and o.kind == "refused"
