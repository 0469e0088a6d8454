"""What a strategy works with in a round: what it may know of the run, exchanges with clients, evaluation, the log."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedsim.engine.workshop import Computation, Workshop
from fedsim.errors import ClientError, StrategyError, ThinRoundError
from fedsim.exchange.fold import Fold
from fedsim.exchange.measured_tasks import is_measuring
from fedsim.exchange.payload import Message, Outcome, Payload, Replies
from fedsim.local.newcomer import HELD_OUT
from fedsim.sampling import Population, Sampler
from fedsim.sampling.rules import Measure
from fedsim.server import pricing
from fedsim.server.bench import Bench
from fedsim.server.clientstore import ClientStore
from fedsim.server.context import Context
from fedsim.server.depot import Depot
from fedsim.server.examiner import Examiner
from fedsim.server.exchanger import Exchanger
from fedsim.server.round import Round
from fedsim.server.roundlog import RoundLog
from fedsim.task.vectors import Weights

if TYPE_CHECKING:
    from fedsim.system.clock import Clock
    from fedsim.topology.traffic import Traffic


AT_ONCE = 16  # items per worker that lie in memory together, see ``Server.spread``


@dataclass(frozen=True, kw_only=True)
class Server(Context):
    """The server of one round: the run's context, and what can be done in the round.

    The loop makes one for each round (``begin``), with an empty log; everything else is shared by all of them.
    ``Strategy.init`` gets the one they are made from, which has no round: it can tell and evaluate, not exchange.
    """

    exchanger: Exchanger
    examiner: Examiner
    population: Population  # the clients as the sampling rule sees them
    sampler: Sampler
    clock: Clock | None = None  # virtual time, if devices are simulated
    validator: Examiner | None = None  # of the common validation set, if there is one
    triggered: Examiner | None = None  # of the test set with a backdoor's trigger, if there is one
    measured_on: str = ""  # see ``on``
    bench: Bench | None = None  # where the server trains on labelled samples of its own, if it has some
    workshop: Workshop  # where it computes with whole models
    depot: Depot | None = None  # where clients' models lie that were asked for once
    facts: dict[str, Any] = field(default_factory=dict)  # about the run, for its summary
    current: Round | None = None
    record: RoundLog = field(default_factory=RoundLog)  # of the current round

    @staticmethod
    def of(context: Context, **parts: Any) -> Server:
        """The server of a run, before its first round."""
        return Server(**vars(context), **parts)

    def begin(self, round: Round) -> Server:
        """The server of ``round``; virtual time is counted from here."""
        time = None if self.clock is None else self.clock.begin_round()
        return replace(self, current=round, record=RoundLog(time=time))

    def asking(self, cohort: Sequence[int]) -> Server:
        """The server of the same round, now that its cohort is known."""
        return replace(self, current=replace(self.round, cohort=cohort))

    @property
    def round(self) -> Round:
        """The round that is under way."""
        if self.current is None:
            raise ClientError(
                "there is no round under way: exchanges belong inside Strategy.round or evaluate"
            )
        return self.current

    @property
    def log(self) -> dict[str, Any]:
        """Further entries of the round's row: a strategy adds its own."""
        return self.record.entries

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of the clients asked so far in this round, all exchanges."""
        return self.record.outcomes

    @property
    def states(self) -> ClientStore:
        """What clients keep between rounds."""
        return self.exchanger.states

    @property
    def remote(self) -> bool:
        """Whether clients lie beyond a network, with data of their own: what is sent to them costs."""
        return self.exchanger.engine.remote

    def thin(self, why: str, *, whole: bool = False) -> None:
        """The round, or a part of it, had too few updates for the aggregator, or none: note it in the round's row.

        If it is the ``whole`` round, nothing of it counts: what its clients would keep is forgotten.

        Raises:
            ThinRoundError: with ``failures.thin_round=stop``.
        """
        if self.exchanger.failures.thin_round == "stop":
            raise ThinRoundError(
                f"round {self.round.index + 1}: {why}. The run ends, as failures.thin_round=stop says; type "
                "failures.thin_round=skip to leave such rounds out, ask more clients a round, or lower aggregator.f"
            )
        self.log["thin_round"] = why
        if whole:
            self.states.discard()

    def apart(self, phase: str) -> AbstractContextManager[None]:
        """What happens in this block is reported under ``phase``, apart from the round: bytes and seconds."""
        return self.record.apart(phase)

    def sample(
        self, count: int, *key: int, exclude: Collection[int] = (), measure: Measure | None = None
    ) -> list[int]:
        """Up to ``count`` clients to ask, outside ``exclude``, ascending; draws are keyed by ``key``.

        ``measure`` gives losses of candidates on the current model, for rules that ask for them.
        """
        found = self.sampler(self.population, count, *key, exclude=exclude, measure=measure)
        return self.population.there(found, *key, exclude=exclude) if self.population.absent else found

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
        architecture: int = 0,
    ) -> Replies:
        """Send ``message`` to ``clients`` (the round's cohort), run their method ``task``, fold the updates.

        Clients that refuse, fail, drop out or send non-finite values are left out and named in the outcomes; the
        failure policy may stop the run. New client states are committed for accepted updates only. With
        ``wait=False`` virtual time stands still, for exchanges that go on side by side: ``Clock.elapse`` ends them.
        ``turns`` are numbers that key the draws and the learning rate of clients instead of the round: how often each
        has trained, where rounds mean nothing to them. ``traffic`` is what goes over the clients' links, if that is not
        the message and the answers. ``architecture`` is the number of the model that it is about, 0 the run's: vectors
        have its layout, and clients work with it, whatever they train.
        """
        round, record, clock = self.round, self.record, self.clock
        if self.measured_on:
            task = f"{self.measured_on}/{task}"
        if clients is not None and self.roster is not None:
            self._check_there(clients, task)
        if (landing := self.exchanger.landing) is not None:
            landing.check_asked(task, fold, clients, round.cohort)
        asked = sorted(round.cohort if clients is None else clients)
        inquiry = self.exchanger.inquiry(message, fold, task, asked, round.index, turns, architecture)
        schedule = None
        if clock is not None and not is_measuring(task):
            wanted = round.wanted if clients is None else None
            schedule = pricing.plan(clock, self.exchanger, inquiry, record.exchanges, wanted, traffic)
            inquiry = replace(inquiry, clients=schedule.answering, works=schedule.works)
        outcomes, folded = self.exchanger.run(inquiry, round.index)
        if record.phase:
            for o in outcomes:
                o.phase = record.phase
        if traffic is not None:
            traffic.book(outcomes)
        if clock is not None and schedule is not None:
            outcomes = pricing.settle(clock, schedule, inquiry, outcomes)
            if wait:
                clock.elapse(schedule.seconds)
            record.exchanges += 1
        for o in outcomes:
            if o.guesses is not None:
                self.examiner.grade(o)
        record.begins.append(len(record.outcomes))
        record.outcomes.extend(outcomes)
        seconds = schedule.seconds if schedule else 0.0
        return Replies(outcomes, folded, seconds, record.entries, record.memory)

    def _check_there(self, clients: Sequence[int], task: str) -> None:
        """Refuse to ask a client that is not there; those held out are measured, and nothing else."""
        assert self.roster is not None
        gone = [c for c in clients if c in self.roster.absent]
        if gone and task != HELD_OUT:
            raise StrategyError(
                f"the exchange '{task}' asks client {gone[0]}, which is never there (exclude, "
                "evaluation.held_out_clients); ask server.clients instead of range(server.num_clients)"
            )

    def on(self, what: str) -> Server:
        """The same server, which measures on other samples in the place of tests.

        ``val``: the common validation set and the clients' own (``evaluation.validation``, ``client_validation``).
        ``train``: clients' training samples.
        ``attack``: the common test set with a backdoor's trigger.
        """
        other = {"val": self.validator, "attack": self.triggered}
        examiner = other[what] or replace(self.examiner, test_size=0) if what in other else self.examiner
        return replace(self, measured_on=what, examiner=examiner, own_tests=None)

    def pseudo_labels(self, client: int, guesses: Tensor) -> dict[str, float]:
        """How good a client's guesses (n,) of its unlabelled samples' classes are, which it cannot tell; see
        ``Examiner.pseudo_labels``."""
        return self.examiner.pseudo_labels(client, guesses)

    @property
    def knows_withheld(self) -> bool:
        """Whether the evaluator has the labels that clients have not (``data.labelled``)."""
        return self.examiner.truth is not None

    def pseudo_clusters(self, clients: Sequence[int], guesses: Tensor) -> dict[str, float]:
        """How right guesses (n,) for all unlabelled samples of ``clients`` are, where classes have no names; see
        ``Examiner.pseudo_clusters``."""
        return self.examiner.pseudo_clusters(clients, guesses)

    def spread(
        self,
        compute: Callable[[Workshop, Any, Any], Any],
        given: Any,
        items: Iterable[Any],
        purpose: str,
        *numbers: int,
    ) -> Iterator[Any]:
        """``compute(workshop, given, item)`` for every item, in their order, computed by all workers where there are
        several; the same bits for any number. ``compute`` is a function that can be imported; what it draws is keyed by
        ``purpose``, ``numbers`` and the item's place. ``given`` is sent once, as long as it is the same object."""
        engine, shop = self.exchanger.engine, self.workshop
        asked = Computation(compute, purpose, numbers, given)
        if engine.workers == 1 or engine.remote or shop.device != "cpu":
            for item in enumerate(items):
                yield asked.of(shop, item)
            return
        numbered = enumerate(items)
        while block := list(itertools.islice(numbered, AT_ONCE * engine.workers)):
            yield from engine.map("compute", asked, block)

    @property
    def test_size(self) -> int:
        """Samples of the common test set."""
        return self.examiner.test_size

    def evaluate(self, weights: Weights) -> dict[str, Any]:
        """Loss and metrics of ``weights`` on the common test set, with domains also by domain."""
        return self.examiner.evaluate(weights)

    def features(self, weights: Weights) -> Tensor:
        """``model.features`` (n, d) of the whole common test set; computed once a round for the same vector."""
        return self.examiner.features(weights)

    def logits(self, weights: Weights, architecture: int = 0) -> Tensor:
        """Logits (n, C) of the whole common test set; of a model of another ``architecture``, by its number."""
        return self.examiner.logits(weights, architecture)

    def score(self, logits: Tensor) -> dict[str, Any]:
        """What ``evaluate`` gives, of ``logits`` (n, C) of the whole common test set."""
        return self.examiner.score(logits)

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
