"""The engine of a deployment: clients are computed at their nodes, and folded here as a worker would fold them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from fedsim.config.schema import FlowerConfig
from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult, Plan
from fedsim.engine.base import SerialEngine
from fedsim.errors import CheckpointError, ClientError
from fedsim.exchange.downlink import sends_all
from fedsim.exchange.fold import Folder
from fedsim.exchange.payload import Payload
from fedsim.flower.answers import NodeAnswer, failed
from fedsim.flower.asking import GridExchange
from fedsim.flower.longvectors import is_long
from fedsim.flower.masking import masks
from fedsim.flower.nodes import Nodes
from fedsim.flower.questions import Questions
from fedsim.flower.records import Records
from fedsim.flower.standing import content
from fedsim.flower.taking import Taking
from fedsim.flower.unmasking import MaskedExchange
from fedsim.flower.wire import ask_records, shared_records, stamp_state
from fedsim.server import checkpoint
from fedsim.server.traits import StrategyLike
from fedsim.task import room
from fedsim.task.layout import Layout

EMPTY: Mapping[str, Any] = {}


class FlowerEngine:
    """``run`` goes to the nodes; everything else, such as the common test set, is computed in this process.

    Of a client's state the server keeps only the stamp (round and exchange) of the one that counts. It is proposed,
    accepted, checkpointed and restored like the state itself in a simulation, and told to the node with each message.
    """

    workers = 1
    remote = True

    def __init__(
        self,
        grid: Grid,
        nodes: Nodes,
        config: FlowerConfig,
        folder: Path,
        method: StrategyLike,
        terms: Mapping[str, Any] = EMPTY,
        taking: Taking | None = None,
    ):
        self._grid, self._nodes, self._config, self._folder = grid, nodes, config, folder
        self._method, self._terms = method, terms  # terms: records that every message carries
        self._taking = taking or Taking()
        self._questions: Questions | None = None
        self._local = SerialEngine()
        self._plan: Plan | None = None
        self._layout: Layout | None = None
        self._run = ""
        self._round, self._exchange = -1, -1
        self._standing: tuple[Payload | None, str] = None, ""

    def start(self, plan: Plan) -> None:
        """Prepare this process; take up the state of the nodes if the run folder has a checkpoint to go on from."""
        self._plan, self._layout = plan, Layout(plan.task.model, plan.dtype)
        self._local.start(plan)
        self._questions = Questions(self._local, self._method, self._config.lost_state == "stop", self._awake)
        self._taking.most = self._questions.most_bytes
        path = self._folder / "deployment.json"
        found = checkpoint.latest(self._folder / "checkpoint")
        resumes = found is not None
        if resumes and not path.exists():
            raise CheckpointError(
                f"{path} is missing: the nodes' state cannot be told; resume=never starts afresh"
            )
        if not resumes:
            path.write_text(json.dumps({"run": uuid.uuid4().hex[:16], "own_data": self.own_data}))
        self._run = json.loads(path.read_text())["run"]
        if found is None:
            self._nodes.event("run", run=self._run)
        else:  # `exchange` says which rounds are begun again
            self._nodes.event("resumed", run=self._run, done=checkpoint.rounds_of(found))

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Within, this process's own worker computes; of large models it has no memory otherwise."""
        try:
            yield
        finally:
            if self._large:
                room.emptied(self._local.worker.model)
            room.rest()

    @property
    def _large(self) -> bool:
        assert self._plan and self._layout, "start(plan) comes first"
        return self._layout.size * self._plan.dtype.itemsize > room.LARGE

    @property
    def own_data(self) -> bool:
        """Whether nodes bring their own data."""
        return any(node.own for node in self._nodes.of.values())

    def map(
        self, method: str, shared: Any, items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> Iterator[Any]:
        """``run``: one exchange with the clients of all chunks, results in order. Others as in a serial engine."""
        if method == "run":
            yield from self._over_the_grid(shared, items)
        else:
            with self._awake():
                yield from self._local.map(method, shared, items, costs)

    def close(self) -> None:
        """Nodes go on for other runs; nothing to stop but this process's own worker."""
        self._local.close()

    def _over_the_grid(self, broadcast: Broadcast, chunks: Sequence[Chunk]) -> Iterator[ChunkResult]:
        assert self._plan and self._layout and self._questions, "start(plan) comes first"
        layout = self._layout
        self._exchange = self._exchange + 1 if broadcast.round == self._round else 0
        self._round = broadcast.round
        number = self._exchange
        room.rest()
        shared = Outgoing(
            lambda lacks: shared_records(broadcast, layout) if lacks else self._shared(broadcast, layout)
        )
        self._nodes.event("exchange", round=broadcast.round + 1, exchange=number, task=broadcast.task)
        place = {client: chunk for chunk in chunks for client in chunk.clients}
        if not masks(self._plan.release, broadcast.fold, broadcast.task):
            exchange = self._asked(broadcast, place, number, shared)
            for chunk in chunks:
                yield self._fold(broadcast, chunk, exchange.answer, number)
            self._questions.forget()
            return
        assert self._plan.release is not None
        masked = MaskedExchange(
            self._plan.release, broadcast, list(place), self._run, self._plan.seed, self._leg
        )
        there = {c: _with(chunk, c, masked) for c, chunk in place.items() if c not in masked.lost}
        exchange = self._asked(broadcast, there, number, shared)
        results = [
            self._fold(broadcast, chunk, lambda c: masked.lost.get(c) or exchange.answer(c), number)
            for chunk in chunks
        ]
        if why := masked.unmask(results, layout):
            self._undo(broadcast, results, number, why)
        yield from results

    def _asked(
        self,
        broadcast: Broadcast,
        place: Mapping[int, Chunk],
        number: int,
        shared: Outgoing,
    ) -> GridExchange:
        """An exchange with the clients of ``place``; ``shared`` is what all receive, whole or not."""
        assert self._plan and self._layout and self._questions
        layout, questions = self._layout, self._questions

        def sent() -> None:
            shared.forget()
            if self._large:
                questions.foresee()

        return GridExchange(
            grid=self._grid,
            nodes=self._nodes,
            clients=list(place),
            content=lambda client, lacks: ask_records(
                {**shared(lacks or sends_all(place[client].part(client))), **self._terms},
                place[client],
                client,
                self._run,
                number,
                layout,
            ),
            deadline=self._config.deadline,
            poll=self._config.poll,
            retries=self._plan.failures.retries,
            read=questions.reader(broadcast, place, self._run, number),
            round=broadcast.round,
            sent=sent,
            one_by_one=self._large,
        )

    def _leg(self, broadcast: Broadcast, place: Mapping[int, Chunk]) -> Mapping[int, NodeAnswer]:
        """One leg of secure aggregation: the answers of all who were asked."""
        assert self._layout is not None
        layout = self._layout
        shared = Outgoing(lambda lacks: shared_records(broadcast, layout))
        exchange = self._asked(broadcast, place, self._exchange, shared)
        return {client: exchange.answer(client) for client in place}

    def _undo(self, broadcast: Broadcast, results: Sequence[ChunkResult], number: int, why: str) -> None:
        """Nobody counts: the masks stay on the sum."""
        for result in results:
            result.states.clear()
            for o in result.outcomes:
                if o.kind == "ok":
                    o.kind, o.reason = "dropped", why
                    self._note(broadcast, number, NodeAnswer(o))

    def _shared(self, broadcast: Broadcast, layout: Layout) -> Records:
        """What goes to clients that hold what the broadcast relies on: the same object as long as it says the same."""
        if broadcast.standing is None:
            return shared_records(broadcast, layout)
        if broadcast.standing is not self._standing[0]:
            self._standing = broadcast.standing, content(broadcast.standing, layout)
        return shared_records(broadcast, layout, self._standing[1])

    def _fold(
        self, broadcast: Broadcast, chunk: Chunk, answers: Callable[[int], NodeAnswer], number: int
    ) -> ChunkResult:
        """A chunk's sums in client order, as ``Worker.run`` makes them."""
        folder = Received(broadcast.fold)
        result = ChunkResult(folder, [], {})
        for client in chunk.clients:
            answer = self._checked(folder, answers(client))
            outcome = answer.outcome
            if answer.lost:
                self._note(broadcast, number, answer)
                said = outcome.reason or "it says that its state is lost (engine.lost_state=stop)"
                mine = said.startswith(f"client {client} ")
                raise ClientError(said if mine else f"client {client}: {said}")
            if outcome.kind == "ok":
                folder.add(answer.arrays, outcome.weight)
                if answer.stateful:
                    result.states[client] = stamp_state((broadcast.round, number))
            self._note(broadcast, number, answer)
            result.outcomes.append(outcome)
        result.folder = folder.cpu()
        return result

    def _checked(self, folder: Folder, answer: NodeAnswer) -> NodeAnswer:
        """The answer, refused if it does not fit those folded before it."""
        if answer.outcome.kind == "ok":
            try:
                folder.check(answer.arrays)
            except ClientError as error:
                return failed(answer, str(error))
        return answer

    def _note(self, broadcast: Broadcast, number: int, answer: NodeAnswer) -> None:
        """What a simulation would not do by itself, for the replay."""
        outcome = answer.outcome
        about = {"round": broadcast.round + 1, "exchange": number, "task": broadcast.task}
        about |= {"client": outcome.client}
        if outcome.kind in ("dropped", "failed") or answer.objected:
            self._nodes.event("absent", **about, reason=outcome.reason)
        if answer.restarted:
            outcome.metrics = {**outcome.metrics, "state_restarted": 1.0}
            self._nodes.event("restarted", **about)


class Received(Folder):
    """Sums of what nodes sent; long vectors are put together here, and nobody else's."""

    def owns(self, array: Tensor) -> bool:
        """Whether it was put together of parts."""
        return is_long(array)


class Outgoing:
    """What all clients of an exchange receive, whole or not: made when messages are, and kept no longer, since it is
    as large as the model."""

    def __init__(self, make: Callable[[bool], Records]):
        self._make, self._made = make, dict[bool, Records]()

    def __call__(self, lacks: bool) -> Records:
        """The same object for all messages that go out together: the link stores it once."""
        if lacks not in self._made:
            self._made[lacks] = self._make(lacks)
        return self._made[lacks]

    def forget(self) -> None:
        """The messages are out."""
        self._made.clear()


def _with(chunk: Chunk, client: int, masked: MaskedExchange) -> Chunk:
    """The chunk of one client, with the shares of its neighbours."""
    own = chunk.alone(client)
    return replace(own, each={client: masked.part(client, own.each.get(client))})
