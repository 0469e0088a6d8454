"""The round loop: sample, let the strategy work, measure, record, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedsim.config.schema import CheckpointConfig, EvaluationConfig
from fedsim.errors import CheckpointError, TooFewUpdates
from fedsim.rng import hashing, key, seed_global
from fedsim.server import checkpoint, weightsfile
from fedsim.server.blame import Kept, blamed, check_numbers, check_state
from fedsim.server.exchanges import Server
from fedsim.server.handed import Handed, as_state, models_of
from fedsim.server.lost import check_moved, lost
from fedsim.server.measuring import measured
from fedsim.server.round import Round
from fedsim.server.roundlog import Row
from fedsim.server.traits import State, StrategyLike
from fedsim.task.frozen import FrozenBase, base_of
from fedsim.task.vectors import Weights
from fedsim.tracking import Trackers
from fedsim.tracking.information import RoundInfo
from fedsim.tracking.rows import lasting

OWN = "simulator/"  # begins the names of the simulator's own entries in a checkpoint
REMEMBERED = "aggregator/"  # begins those of the last results of a rule that goes on from them


@dataclass
class Loop:
    """One run: everything it needs, and its progress."""

    strategy: StrategyLike
    server: Server  # of no round yet: each gets its own
    trackers: Trackers
    rounds: int
    clients_per_round: int
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig
    folder: Path
    key: str
    cohorts: Sequence[Sequence[int]] | None = None
    state: State = field(default_factory=dict)
    own: Row = field(default_factory=dict)  # the simulator's part of the state: clock, what sampling has seen
    done: int = 0  # finished rounds
    stopped: str = ""  # why a callback ended the run before its last round
    saved: int = -1  # finished rounds in the newest checkpoint
    accepting: bool = False  # within ``_accept``: memory holds neither the old round nor the new one
    history: list[Row] = field(default_factory=list)  # see ``lasting``
    kept: Kept | None = None  # the strategy as it was before the first round of this process
    given: Handed | None = None  # what the strategy was given for the round that is under way

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint."""
        found, server = checkpoint.load(path, self.key, self.server.layout), self.server
        self.state, self.done, self.saved = found.state, found.rounds, found.rounds
        server.states.restore(found.clients, found.upgrade)
        self.own = {k: self.state.pop(k) for k in list(self.state) if k.startswith(OWN)}
        if server.clock is not None:
            server.clock.restore(self.own[f"{OWN}clock"])
        self._check_base(path)
        if server.sampler.remembers:
            server.population.restore(self.own[f"{OWN}seen"])
        if (landing := server.exchanger.landing) is not None:
            at = f"{OWN}release"
            landing.restore({k.removeprefix(at): v for k, v in self.own.items() if k.startswith(at)})

    def run(self) -> None:
        """All remaining rounds. If one fails or is interrupted, the last finished round is checkpointed first.

        A round is finished once it has been measured; if it was not, it is done again on resumption.

        Raises:
            ThinRoundError: at the end, if no update of any client counted in any round (see ``lost``).
        """
        self.kept = Kept(self.strategy)
        if not self.state:
            seed_global(key(self.server.seed, "server/init"))
            with blamed(self.strategy, "init", "before round 1"):
                self.state = as_state(self.strategy, "init", self.strategy.init(self.server))
            self.kept.after("init", "before round 1")
            self.models()  # says what the state lacks
            check_state(self.strategy, self.state)
        try:
            while self.done < self.rounds and not self._spent():
                self._round()
            self.save()
            check_moved(self.history)
        except BaseException as e:
            self.server.states.discard()
            try:
                if self.given is not None and (name := self.given.written):
                    e.add_note(f"{name} was written to: the last finished round can't be checkpointed")
                elif self.done and not self.accepting:
                    self.save()
            except Exception as lost:
                e.add_note(f"The last finished round could not be checkpointed either: {lost}")
            raise

    def _spent(self) -> bool:
        """Whether the next round would cost more privacy than there is: the run ends here, done."""
        landing = self.server.exchanger.landing
        if landing is None or not landing.spent(self.done + 1):
            return False
        self.rounds, self.stopped = self.done, "privacy budget"
        return True

    def save(self) -> None:
        """Checkpoint the last finished round, unless that is done; its row is written first, or a run that goes on from
        there would lack it."""
        if self.saved != self.done:
            state, folder = self.state | self.own | self._base(), self.folder / "checkpoint"
            kept = f"round {self.saved} is still there" if self.saved > 0 else "there is none before it"
            try:
                self.trackers.flush()
            except OSError as e:
                raise CheckpointError(
                    f"{e.filename} could not be written ({e.strerror}), so round {self.done} gets no checkpoint; "
                    f"{kept}. Make room and type the same command again: it goes on from there"
                ) from e
            try:
                keep = self.checkpoints.keep
                checkpoint.save(folder, self.done, state, self.server.states, self.key, keep)
            except (OSError, SafetensorError) as e:
                raise CheckpointError(
                    f"the checkpoint of round {self.done} could not be written to {folder} ({e}); {kept}. "
                    "Make room and type the same command again: it goes on from there"
                ) from e
            self.saved = self.done

    def _base(self) -> Row:
        """What a checkpoint says of the part of the model that it does not hold, since it is frozen."""
        base = base_of(self.server.task.model)
        return {} if base is None else {f"{OWN}base": {"name": base.name, "sha256": base.sha256}}

    def _check_base(self, path: Path) -> None:
        then, now = self.own.pop(f"{OWN}base", None), base_of(self.server.task.model)
        if then is not None and now is not None and then["sha256"] != now.sha256:
            raise CheckpointError(
                f"checkpoint {path} was made with the frozen base {FrozenBase(**then)}, but this run's model has {now};"
                " load the base from before, or give resume=never to start afresh"
            )

    def models(self) -> Mapping[str, Weights]:
        """The models of the current state."""
        return models_of(self.strategy, self.state, self.server.layout)

    def _round(self) -> None:
        """Sample, let the strategy work, measure, record, checkpoint."""
        started = time.perf_counter()
        server, strategy, layout = self._sampled(self.done), self.strategy, self.server.layout
        self.given = Handed(strategy, state=self.state, start=server.start._asdict())
        seed_global(key(server.seed, "server/round", self.done))
        when = f"in round {self.done + 1}"
        memory = server.record.memory
        memory |= {k.removeprefix(REMEMBERED): v for k, v in self.state.items() if k.startswith(REMEMBERED)}
        try:
            with blamed(strategy, "round", when):
                found = strategy.round(server, self.state, server.round)
            state = as_state(strategy, "round", found, self.state)
            state = state | {f"{REMEMBERED}{k}": v for k, v in memory.items()} if memory else state
        except TooFewUpdates as thin:
            server.thin(str(thin), whole=True)
            state = self.state
        if "thin_round" not in server.log and (why := lost(server.outcomes)):
            server.thin(why)
        self.given.check("round")
        check_numbers(strategy, state, self.state, when)
        if not self.done:
            check_state(strategy, state)
        traits = self.strategy.traits
        cohort = server.record.heard() if traits.asynchronous or traits.everybody else server.round.cohort
        if server.clock and not cohort and not self.strategy.traits.asynchronous:
            server.clock.elapse(server.clock.system.idle)
        self._observe(server)
        with blamed(strategy, "evaluate", when):
            models = models_of(strategy, state, layout)
            digest = hashing(piece for name in sorted(models) for piece in models[name].pieces(layout))
            measures = self._measured(server, state)
        if self.kept is not None:
            self.kept.after("round", when)
        if (landing := server.exchanger.landing) is not None:
            server.record.entries |= landing.row_entries(server.facts)
        row = server.record.row(self.done + 1, measures, cohort, digest(), started)
        self._accept(state)
        self.history.append(lasting(row))
        if weightsfile.is_best(self.history):
            best, about = self.folder / weightsfile.BEST, {"round": str(self.done)}
            weightsfile.save(best, server.task, server.dtype, models["global"], about)
        self._tell(row, server, models, bool(measures))
        if self._reached(row):
            self.rounds = self.done
        every, keep = self.checkpoints.every, self.checkpoints.keep
        if (every and self.done % every == 0) or (keep != "all" and checkpoint.keeps(keep, self.done)):
            self.save()

    def _sampled(self, index: int) -> Server:
        """The server of a round, whose cohort is drawn: more clients than needed where the fleet's settings say so."""
        run = self.server
        wanted = None if self.cohorts is not None else self.clients_per_round
        server = run.begin(Round(index, (), run.num_clients, run.seed, run.local, wanted))
        if self.strategy.traits.asynchronous:
            return server
        if self.cohorts is not None:
            return server.asking(self.cohorts[index])
        over_selection = run.clock.system.over_selection if run.clock else 1
        count = min(math.ceil(self.clients_per_round * over_selection), len(run.sizes))
        return server.asking(server.sample(count, index, measure=partial(self._losses, server)))

    def _losses(
        self, server: Server, clients: Sequence[int], task: str = "losses"
    ) -> dict[int, Mapping[str, Any]]:
        """Losses on clients' training samples of the model that the round starts from."""
        return server.losses(self.models()["global"], clients, task)

    def _observe(self, server: Server) -> None:
        """Let the sampling rule see what the round's clients were like."""
        if not server.sampler.remembers:
            return
        outcomes, losses = server.outcomes, None
        if server.sampler.wants_squares:
            trained = {o.client for o in outcomes if o.kind == "ok" and "train_loss" in o.metrics}
            losses = {c: v["loss_rms"] for c, v in self._losses(server, sorted(trained), "utility").items()}
        server.population.observe(server.round.index, outcomes, losses)

    def _measured(self, server: Server, state: State) -> Row:
        """What is to be measured after this round (see ``measuring``)."""
        last, layout = server.round.index + 1 == self.rounds, server.layout
        weights = lambda: models_of(self.strategy, state, layout)["global"]  # noqa: E731
        return measured(server, self.strategy, state, self.evaluation, last, weights)

    def _accept(self, state: State) -> None:
        """The round is finished: its results are what counts from now on."""
        server = self.server
        self.accepting, self.given = True, None
        server.states.accept()
        self.state, self.done = state, self.done + 1
        self.own = {}
        if server.clock is not None:
            self.own[f"{OWN}clock"] = server.clock.save()
        if server.sampler.remembers:
            self.own[f"{OWN}seen"] = server.population.save()
        if (landing := server.exchanger.landing) is not None:
            self.own |= {f"{OWN}release{k}": v for k, v in landing.save().items()}
        self.accepting = False

    def _tell(self, row: Row, server: Server, models: Mapping[str, Weights], measured: bool) -> None:
        """Trackers and callbacks hear of the finished round; the latter may end the run."""
        clients = server.record.client_rows(self.done)
        self.trackers.round(row, clients)
        info = RoundInfo(
            round=self.done,
            rounds=self.rounds,
            row=row,
            past=self.history,
            clients=clients,
            measured=measured,
            task=server.task,
            dtype=server.dtype,
            models=models,
        )
        self.trackers.informed(info)
        if info.stopped and self.done < self.rounds:
            self.rounds, self.stopped = self.done, info.stopped

    def _reached(self, row: Row) -> bool:
        target = self.evaluation.target
        return self.evaluation.stop_at_target and target is not None and row.get("accuracy", -1.0) >= target
