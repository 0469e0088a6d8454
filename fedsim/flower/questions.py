"""What clients are asked in an exchange, put together for whoever judges their answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from flwr.app import RecordDict

from fedsim.data.federated import FederatedData
from fedsim.data.shards import Shards
from fedsim.data.trees import leaves
from fedsim.engine.assignments import Broadcast, Chunk, Plan
from fedsim.engine.base import SerialEngine
from fedsim.exchange.downlink import bare_down, opened_down, sends_all
from fedsim.exchange.packing import sent_bytes
from fedsim.exchange.payload import Payload
from fedsim.flower.answers import NodeAnswer, ReplyTo
from fedsim.flower.checking import Judge, OwnAnswer, Question
from fedsim.flower.masking import LEGS, bare
from fedsim.flower.ownanswer import trial
from fedsim.server.traits import ClientQuestion, StrategyLike, statistics_of

SPARE = 16  # times what an answer has
Reader = Callable[[RecordDict, int, bool], NodeAnswer]


class Questions:
    """The questions of one run. ``local`` is the server's own engine, which answers the first of a kind, within
    ``awake()``."""

    def __init__(
        self,
        local: SerialEngine,
        method: StrategyLike,
        lost_is_the_end: bool,
        awake: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        plan = local.worker.plan
        self._local, self._plan, self._layout, self._awake = local, plan, local.worker.model.layout, awake
        self._asking: tuple[Broadcast, Mapping[int, Chunk]] | None = None
        self._opened: tuple[Broadcast | None, Payload] = None, Payload()
        self._judge = Judge(
            method, self._layout, plan.dtype,
            method.traits.metrics | frozenset(plan.task.metrics or ()),
            self._trial,
            lost_is_the_end,
            plan.release,
            plan.seed,
            statistics_of(method),
        )  # fmt: skip
        self._domains = max(len(plan.data.dataset.domains), plan.data.num_clients)

    def reader(self, broadcast: Broadcast, place: Mapping[int, Chunk], run: str, exchange: int) -> Reader:
        """Makes an answer of what ``client`` replied to its message, ``whole`` or without what it holds."""
        self._asking = broadcast, place
        self._first = ReplyTo(run, broadcast.round, exchange, next(iter(place), -1))

        def read(content: RecordDict, client: int, whole: bool) -> NodeAnswer:
            to = ReplyTo(run, broadcast.round, exchange, client)
            return self._judge.read(content, self.question(broadcast, place[client], to, whole))

        return read

    def foresee(self) -> None:
        """Answer the question of one client now, while its node works: there is more room than once replies come."""
        assert self._asking, "reader comes first"
        broadcast, place = self._asking
        if self._first.client in place:
            question = self.question(broadcast, place[self._first.client], self._first, whole=True)
            self._judge.foresee(question)

    def most_bytes(self) -> float:
        """Of an answer to what is asked now, with room to spare: each array is judged by itself once it is here."""
        size = SPARE * self._layout.size * self._plan.dtype.itemsize
        if self._asking is None or self._first.client not in self._asking[1]:
            return size
        broadcast, place = self._asking
        question = self.question(broadcast, place[self._first.client], self._first, whole=True)
        return size + SPARE * self._judge.foresee(question)

    def forget(self) -> None:
        """The exchange is over: its message, as large as the model, may go."""
        self._asking, self._opened = None, (None, Payload())

    def _trial(self, question: Question, whole: bool) -> OwnAnswer:
        assert self._asking, "reader comes first"
        broadcast, place = self._asking
        if whole:
            broadcast = replace(broadcast, payload=question.asked.message, standing=None)
            place = {
                question.to.client: replace(
                    place[question.to.client].alone(question.to.client), each={}, rows={}
                )
            }
        with self._awake():
            return trial(self._local.worker, broadcast, place[question.to.client], question)

    def question(self, broadcast: Broadcast, chunk: Chunk, to: ReplyTo, whole: bool) -> Question:
        """What one client was asked."""
        own, standing, plan = chunk.part(to.client), broadcast.standing, self._plan
        if broadcast.task not in LEGS:
            own = bare(own)  # bytes of legs are counted with all of them: ``fedsim.exchange.summing.price``
        down = sent_bytes(broadcast.payload, self._layout) + (sent_bytes(own, self._layout) if own else 0)
        whole = whole or sends_all(own)
        if whole and standing is not None:
            down += sent_bytes(standing, self._layout)
        message = (standing or Payload()).joined(self._received(broadcast)).joined(own and bare_down(own))
        local = plan.kinds.local(to.client) if plan.kinds else plan.local
        rows = held(plan, to.client, measured=not broadcast.fold)
        samples = rows and rows * _units(plan, plan.data)
        asked = ClientQuestion(to.client, broadcast.task, message, samples, local, self._domains)
        relies = standing is not None and not whole
        turn = chunk.turns.get(to.client, broadcast.round)
        return Question(
            to, asked, broadcast.fold, bool(chunk.states.get(to.client)), relies, down, turn, rows
        )

    def _received(self, broadcast: Broadcast) -> Payload:
        """The message as clients use it; worked out once."""
        if self._opened[0] is not broadcast:
            plan = self._plan
            about = (broadcast.task, plan.seed, broadcast.round, self._layout, plan.dtype)
            opened = opened_down(plan.release, broadcast.payload, *about, broadcast.standing)
            self._opened = broadcast, opened
        return self._opened[1]


def held(plan: Plan, client: int, measured: bool) -> int:
    """Samples that ``client`` can have trained on, by its introduction and the partition; ``measured``: or be measured
    on."""
    data = plan.data
    count = _of(data.dealt, client)
    if measured:
        roles = (data.holdout, data.local_test, data.roles.client_validation, data.roles.newcomers)
        count += sum(_of(shards, client) for shards in roles) + len(data.dataset.test or ())
    return count


def _of(shards: Shards | None, client: int) -> int:
    return 0 if shards is None else shards.size(client)


def _units(plan: Plan, data: FederatedData) -> float:
    """Units that the task counts in one sample, at most, such as tokens; no bound where samples differ in length."""
    if plan.task.count is None:
        return 1
    y = getattr(data.dataset.train, "y", None)  # targets in memory are all alike; others may differ in length
    return math.inf if y is None else max((math.prod(leaf.shape[1:]) for leaf in leaves(y)), default=1)
