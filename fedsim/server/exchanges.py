"""The server's side of an exchange: messages out in chunks, sums back in chunk order, client states committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.config.schema import ClientConfig, FailureConfig
from fedsim.data.shards import Shards
from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult
from fedsim.engine.chunks import cut
from fedsim.errors import ClientError
from fedsim.exchange.fold import Fold, combine, fold_kinds
from fedsim.exchange.payload import Message, Outcome, Payload, Replies
from fedsim.local.kinds import Classes
from fedsim.local.work import Work, work_of
from fedsim.sampling import Population, Sampler, Uniform
from fedsim.server.clientstore import ClientStore
from fedsim.server.collusion import Collusion
from fedsim.server.examiner import Examiner
from fedsim.server.round import Round
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights

if TYPE_CHECKING:
    from fedsim.system.clock import Clock
    from fedsim.system.schedule import Schedule
    from fedsim.topology import Topology
    from fedsim.topology.traffic import Traffic

BESIDE = "simulator/"  # begins the names of its own entries in a checkpoint
MEASURING = (
    "evaluate",
    "test",
    "utility",
)  # exchanges of the simulator, not of the method: they cost no bytes and no time


@dataclass(kw_only=True)
class Server(Examiner):
    """What a strategy works with: the model's layout, the clients behind an engine, evaluation, and the log."""

    layout: Layout
    start: Weights  # initial model
    sizes: np.ndarray  # (m,) training samples per client
    local: ClientConfig
    failures: FailureConfig
    states: ClientStore
    seed: int
    dtype: torch.dtype
    chunks: int = 0
    share_buffers: bool = True
    own_tests: Shards | None = None  # rows of the common test set that each client is measured on
    client_domains: Sequence[str | None] | None = None  # of every client; None without domains
    topology: Topology | None = None  # of peers that learn without a server
    fresh: Callable[[int], Weights] | None = None  # another initial model per peer
    clock: Clock | None = None  # virtual time, if devices are simulated
    sampler: Sampler = field(default_factory=Uniform)
    participation: str = "fixed"
    classes: Classes | None = None  # kinds of clients; None: all alike
    current: Round | None = None
    exchanges: int = 0  # priced so far in the current round
    collusion: Collusion | None = None  # attackers that see the honest updates
    log: dict[str, Any] = field(default_factory=dict)  # further entries of the round's row
    facts: dict[str, Any] = field(default_factory=dict)  # about the run, for its summary
    outcomes: list[Outcome] = field(default_factory=list)  # of the current round, all exchanges
    phase: str = ""  # see ``apart``
    phases: dict[str, float] = field(default_factory=dict)  # seconds of the current round's phases

    @property
    def num_clients(self) -> int:
        """Registered clients m."""
        return len(self.sizes)

    @cached_property
    def population(self) -> Population:
        """The clients as sampling rules see them."""
        return Population(self.sizes, self.seed, self.clock, self.participation)

    def sample(self, count: int, *key: int, exclude: Collection[int] = ()) -> list[int]:
        """Up to ``count`` clients to ask, outside ``exclude``, ascending; draws are keyed by ``key``."""
        return self.sampler(self.population, count, *key, exclude=exclude)

    def save(self) -> dict[str, Any]:
        """What the simulator itself carries from round to round, for a checkpoint."""
        out: dict[str, Any] = {}
        if self.clock is not None:
            out[f"{BESIDE}clock"] = self.clock.save()
        if self.sampler.remembers:
            out[f"{BESIDE}seen"] = self.population.save()
        return out

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave."""
        if self.clock is not None:
            self.clock.restore(saved[f"{BESIDE}clock"])
        if self.sampler.remembers:
            self.population.restore(saved[f"{BESIDE}seen"])

    def initial(self) -> Weights:
        """A copy of the initial model."""
        return Weights(self.start.w.clone(), self.start.buffers.clone())

    @property
    def round(self) -> Round:
        """The round that is under way."""
        if self.current is None:
            raise ClientError(
                "there is no round under way: exchanges belong inside Strategy.round or evaluate"
            )
        return self.current

    def exchange(
        self,
        message: Message,
        fold: Fold,
        *,
        task: str = "fit",
        clients: Sequence[int] | None = None,
        wait: bool = True,
        turns: Mapping[int, int] | None = None,
        traffic: Traffic | None = None,
    ) -> Replies:
        """Send ``message`` to ``clients`` (the round's cohort), run their method ``task``, fold the updates.

        Clients that refuse, fail, drop out or send non-finite values are left out and named in the outcomes; the
        failure policy may stop the run. New client states are committed for accepted updates only. With
        ``wait=False`` virtual time stands still, for exchanges that go on side by side: ``Clock.elapse`` ends them.
        ``turns`` are numbers that key the draws and the learning rate of clients instead of the round: how often each
        has trained, where rounds mean nothing to them. ``traffic`` is what goes over the clients' links, if that is not
        the message and the answers.
        """
        cohort = sorted(self.round.cohort if clients is None else clients)
        if message.rows:
            message = message.addressed(cohort, without=() if self.share_buffers else ("buffers",))
        broadcast = self._broadcast(message, fold, task, self.round.index)
        works = self._works(cohort, self.round.index)
        plan = None
        if self.clock is not None and task not in MEASURING:
            if self.clock.predicts:
                self._try_out(broadcast, message, works)
            wanted = self.round.wanted if clients is None else None
            plan = self._plan(broadcast, message, works, wanted, traffic)
            cohort, works = plan.answering, plan.works
        outcomes, folded = self._run(broadcast, message, cohort, works, turns)
        if traffic is not None:
            traffic.book(outcomes)
        if plan is not None:
            outcomes = sorted([*outcomes, *plan.lost(task)], key=lambda o: o.client)
            assert self.clock is not None
            self.clock.settle(plan, outcomes, kind_of(broadcast))
            if wait:
                self.clock.elapse(plan.seconds)
            self.exchanges += 1
        self.outcomes.extend(outcomes)
        return Replies(outcomes, folded, plan.seconds if plan else 0.0, self.log)

    def depart(self, message: Message, fold: Fold, clients: Sequence[int], index: int) -> Schedule:
        """Start an exchange without waiting for it: when each of ``clients`` will answer, or be lost.

        ``index`` keys the clients' draws, as the round does in ``exchange``. ``collect`` trains them, at any time.
        """
        works = self._works(clients, index)
        broadcast = self._broadcast(message, fold, "fit", index)
        self._try_out(broadcast, message, works)
        return self._plan(broadcast, message, works)

    def collect(self, message: Message, fold: Fold, steps: Mapping[int, int], index: int) -> Replies:
        """The updates of clients that departed, ``steps`` local steps each; time and log stay as they are."""
        works = {c: work.only(steps[c]) for c, work in self._works(steps, index).items()}
        broadcast = self._broadcast(message, fold, "fit", index)
        outcomes, folded = self._run(broadcast, message, list(steps), works)
        if self.clock is not None:
            self.clock.learn(kind_of(broadcast), outcomes, works)
        return Replies(outcomes, folded)

    def _broadcast(self, message: Message, fold: Fold, task: str, index: int) -> Broadcast:
        """What all clients of an exchange share, under the policy for BatchNorm statistics."""
        kinds = fold_kinds(fold)
        shared = message.shared
        if "buffers" in message.rows and task == "fit":
            kinds.setdefault("buffers", ("stack",))
        if "buffers" in shared.arrays:
            if self.share_buffers and task == "fit":
                kinds.setdefault("buffers", ("mean",))
            elif not self.share_buffers:
                shared = Payload({k: v for k, v in shared.arrays.items() if k != "buffers"}, shared.values)
        return Broadcast(index, task, shared, kinds, message.standing, message.keep)

    def _plan(
        self,
        broadcast: Broadcast,
        message: Message,
        works: Mapping[int, Work],
        wanted: int | None = None,
        traffic: Traffic | None = None,
    ) -> Schedule:
        """Who will answer, and when."""
        assert self.clock is not None, "only devices know how long they take"
        size = broadcast.payload.nbytes + message.row_bytes
        down = [size + (message.each[c].nbytes if c in message.each else 0) for c in works]
        return self.clock.plan(
            works,
            down if traffic is None else traffic.received[list(works)],
            None if traffic is None else traffic.sent[list(works)],
            kind=kind_of(broadcast),
            round=broadcast.round,
            number=self.exchanges,
            wanted=wanted,
        )

    def _try_out(self, broadcast: Broadcast, message: Message, works: Mapping[int, Work]) -> None:
        """Measure on one client what an exchange takes whose kind was not seen yet; its update is not used."""
        probe = next((c for c, w in works.items() if w.samples), None)
        if self.clock is not None and kind_of(broadcast) not in self.clock.facts and probe is not None:
            state = {probe: self.states.get(probe)}
            chunk = Chunk([probe], message.each, state, rows=message.own([probe]))
            (result,) = self.engine.map("run", broadcast, [chunk])
            self.clock.learn(kind_of(broadcast), result.outcomes, {probe: works[probe]})

    def _run(
        self,
        broadcast: Broadcast,
        message: Message,
        cohort: Sequence[int],
        works: Mapping[int, Work],
        turns: Mapping[int, int] | None = None,
    ) -> tuple[list[Outcome], dict[tuple[str, str], Tensor]]:
        """Train ``cohort`` in chunks; outcomes in client order, and the folded updates."""
        chunks, costs = [], []
        work = [1.0 + works[c].steps * works[c].batch for c in cohort]
        for span in cut(work, self.chunks, self.layout.dim):
            ids = cohort[span]
            each = {c: message.each[c] for c in ids if c in message.each}
            states = {c: s for c in ids if (s := self.states.get(c))}
            fewer = {c: works[c].steps for c in ids if works[c].short}
            own = message.own(ids)
            due = {c: turns[c] for c in ids} if turns is not None else {}
            chunks.append(Chunk(ids, each, states, fewer, own, due))
            costs.append(sum(work[span]))
        asked = broadcast
        if self.collusion is not None:
            asked = replace(broadcast, fold=self.collusion.widen(broadcast.fold))
        outcomes: list[Outcome] = []

        def accepted() -> object:
            result: ChunkResult
            for result in self.engine.map("run", asked, chunks, costs):
                outcomes.extend(result.outcomes)
                _enforce(self.failures, result.outcomes, self.round.index)
                for client, state in result.states.items():
                    self.states.propose(client, broadcast.round, state)
                yield result.folder

        folded = combine(accepted(), len(cohort))  # type: ignore[arg-type]
        if self.collusion is not None:
            folded = self.collusion.apply(folded, outcomes, broadcast.fold)
        for o in outcomes:
            o.task, o.phase = broadcast.task, self.phase
        return outcomes, folded

    @contextmanager
    def apart(self, phase: str) -> Iterator[None]:
        """What happens in this block is reported under ``phase``, apart from the round: bytes and seconds."""
        outer, self.phase, start = self.phase, phase, time.perf_counter()
        try:
            yield
        finally:
            self.phase = outer
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def evaluate_clients(self, weights: Weights, clients: Sequence[int]) -> Replies:
        """Measure ``weights`` on the own test samples of ``clients`` (with what each of them keeps)."""
        arrays: Mapping[str, Tensor] = weights._asdict()
        return self.exchange(Message(Payload(arrays)), {}, task="evaluate", clients=clients)

    def losses(
        self, weights: Weights, clients: Sequence[int], task: str = "losses"
    ) -> dict[int, Mapping[str, Any]]:
        """``loss`` and ``loss_rms`` of ``weights`` on the training samples of ``clients``, of those that answer.

        Costs a message, a forward pass and an answer each; with ``task="utility"`` nothing.
        """
        arrays: Mapping[str, Tensor] = weights._asdict()
        replies = self.exchange(Message(Payload(arrays)), {}, task=task, clients=clients)
        return {o.client: o.values for o in replies.ok}

    def _works(self, clients: Iterable[int], index: int) -> dict[int, Work]:
        sizes = {c: int(self.sizes[c]) for c in clients}
        if self.classes:
            return {c: work_of(self.classes.local(c), n, self.seed, index, c) for c, n in sizes.items()}
        if self.local.min_epochs is not None:
            return {c: work_of(self.local, n, self.seed, index, c) for c, n in sizes.items()}
        alike = {n: work_of(self.local, n, self.seed, index, 0) for n in set(sizes.values())}
        return {c: alike[n] for c, n in sizes.items()}


def kind_of(broadcast: Broadcast) -> str:
    """Exchanges of one kind cost alike: the same task on a message of the same size."""
    return f"{broadcast.task}/{broadcast.payload.nbytes}"


def _enforce(policy: FailureConfig, outcomes: Sequence[Outcome], round: int) -> None:
    """Stop the run where ``failures`` says so, naming the client."""
    for o in outcomes:
        stop = (o.kind == "failed" and policy.policy == "stop") or (
            o.kind == "nonfinite" and policy.nonfinite == "stop"
        )
        if stop:
            key = "policy" if o.kind == "failed" else "nonfinite"
            raise ClientError(
                f"client {o.client} {o.kind} in round {round + 1}: {o.reason.strip()}\n"
                f"(failures.{key}=skip goes on without such clients)"
            )
