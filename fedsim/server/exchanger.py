"""How an exchange is carried out: messages out in chunks, sums back in chunk order, client states proposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from fedsim.config.schema import FailureConfig
from fedsim.engine.assignments import Broadcast, Chunk, ChunkResult
from fedsim.engine.chunks import Lazy, cut
from fedsim.errors import ClientError
from fedsim.exchange.descent import Descent
from fedsim.exchange.downlink import opened_down, packed_down
from fedsim.exchange.fold import Fold, Folder, combine, fold_kinds
from fedsim.exchange.landing import Landing
from fedsim.exchange.payload import WEIGHT, Message, Outcome, Payload
from fedsim.exchange.release import FITS
from fedsim.exchange.secagg import LegBytes
from fedsim.exchange.summing import price
from fedsim.local.work import Work, work_of
from fedsim.rng import key, seed_global
from fedsim.server.clientstore import ClientStore
from fedsim.server.collusion import Collusion
from fedsim.server.context import Context

if TYPE_CHECKING:
    from fedsim.engine.base import Engine

Folded = dict[tuple[str, str], Tensor]  # (array name, kind of fold) to what the clients' arrays came to


@dataclass(frozen=True)
class Inquiry:
    """An exchange that is about to begin: what is asked, of whom, and how much work it is for each."""

    broadcast: Broadcast
    message: Message
    clients: Sequence[int]  # ascending
    works: Mapping[int, Work]  # of these clients at least
    turns: Mapping[int, int] | None = None  # see ``Server.exchange``
    cohort: Sequence[int] = ()  # who were to be asked, those who are then lost among them
    descent: Descent | None = None  # of a model that goes down by differences

    @property
    def kind(self) -> str:
        """Exchanges of one kind cost alike: the same task on a message of the same size."""
        kind, model = f"{self.broadcast.task}/{self.broadcast.payload.nbytes}", self.broadcast.architecture
        return f"{kind}/{model}" if model else kind


@dataclass(frozen=True, kw_only=True)
class Exchanger:
    """Carries out exchanges on an engine, as the run's settings say; knows neither rounds nor time."""

    context: Context
    engine: Engine
    states: ClientStore
    failures: FailureConfig
    chunks: int = 0  # of a cohort; 0: see ``cut``
    crowd: int = 0  # clients of a chunk instead, where a chunk's clients are computed at once
    collusion: Collusion | None = None  # attackers that see the honest updates
    landing: Landing | None = None  # the server's half of the release

    def inquiry(
        self,
        message: Message,
        fold: Fold,
        task: str,
        clients: Sequence[int],
        index: int,
        turns: Mapping[int, int] | None = None,
        architecture: int = 0,
    ) -> Inquiry:
        """What is to be asked of ``clients``, ascending; their draws are keyed by ``index`` unless by ``turns``. It is
        about the model that is the run's ``architecture``."""
        if message.rows:
            without = () if self.context.share_buffers else ("buffers",)
            message = message.addressed(clients, without=without)
        broadcast = replace(self._broadcast(message, fold, task, index), architecture=architecture)
        if (descent := self._descent(broadcast, message, clients)) is not None:
            broadcast = replace(broadcast, payload=descent.shared, standing=descent.standing)
            each = {c: descent.parts[c].joined(message.each.get(c)) for c in descent.parts}
            message = replace(message, each={**message.each, **each})
        works = self._works(clients, index)
        return Inquiry(broadcast, message, clients, works, turns, tuple(clients), descent)

    def _descent(self, broadcast: Broadcast, message: Message, clients: Sequence[int]) -> Descent | None:
        """How a model goes down by differences, if it does: one that all are sent, and need not keep otherwise."""
        held = None if self.landing is None else self.landing.held
        other = message.keep or message.standing is not None or broadcast.architecture
        if held is None or other or not broadcast.fold:
            return None
        return held.descend(broadcast.payload, broadcast.task, clients)

    def run(self, inquiry: Inquiry, round: int) -> tuple[list[Outcome], Folded]:
        """Outcomes in client order, and the folded updates; new client states are proposed.

        Raises:
            ClientError: where the failure policy says so, naming the client and ``round`` (from 0).
        """
        if self.landing is not None:
            self.legs(inquiry)  # a cohort too large for secure sums ends the run before anything is sent
            asked = inquiry.broadcast
            self.landing.begin(asked.fold, asked.task, inquiry.clients, round)
        spans, costs = self._cut(inquiry)
        chunks = Lazy([partial(self._chunk, inquiry, span) for span in spans])
        broadcast = asked = inquiry.broadcast
        if self.collusion is not None:
            asked = replace(broadcast, fold=self.collusion.widen(broadcast.fold))
        outcomes: list[Outcome] = []

        def accepted() -> Iterator[Folder]:
            result: ChunkResult
            for result in self.engine.map("run", asked, chunks, costs):
                outcomes.extend(result.outcomes)
                _enforce(self.failures, result.outcomes, round)
                for client, state in result.states.items():
                    self.states.propose(client, broadcast.round, state)
                folder = [result.folder]
                del result
                yield folder.pop()  # this frame does not hold it while the next one is computed

        folded = combine(accepted(), len(inquiry.clients))
        if self.collusion is not None:
            again = None if self.landing is None else self.landing.clipped
            folded = self.collusion.apply(folded, outcomes, broadcast.fold, self.context.layout, again)
        if self.landing is not None:
            folded = self._landed(self.landing, inquiry, folded, outcomes, round)
        if inquiry.descent is not None and self.landing is not None and self.landing.held is not None:
            self.landing.held.sent(inquiry.descent, outcomes)
        for o in outcomes:
            o.task = broadcast.task
        # what a strategy draws from global generators must not hang on where clients were computed
        seed_global(key(self.context.seed, f"server/{broadcast.task}", round, *inquiry.clients[:1]))
        return outcomes, folded

    def _landed(
        self, landing: Landing, inquiry: Inquiry, folded: Folded, outcomes: Sequence[Outcome], round: int
    ) -> Folded:
        """What the release makes of the sums; nothing, and no new client state, where too few came for masks."""
        broadcast, context = inquiry.broadcast, self.context
        if landing.release.vectors(broadcast.fold, broadcast.task):
            price(landing.release.secure, len(inquiry.cohort), outcomes)
            if why := landing.void(inquiry.cohort, outcomes, broadcast.round):
                self.states.discard()
                for o in outcomes:
                    if o.kind == "ok":
                        o.kind, o.reason = "dropped", why
                return {}
        about = (broadcast.task, context.seed, broadcast.round, context.layout, context.dtype)
        sent = opened_down(landing.release, broadcast.payload, *about, broadcast.standing)
        message = (broadcast.standing or Payload()).joined(sent)
        return landing.land(folded, broadcast.fold, broadcast.task, message, outcomes, round)

    def legs(self, inquiry: Inquiry) -> LegBytes:
        """What masks add to an exchange: bytes of each client, and round trips."""
        secure = None if self.landing is None else self.landing.release.secure
        broadcast = inquiry.broadcast
        if (
            secure is None
            or not self.landing
            or not self.landing.release.vectors(broadcast.fold, broadcast.task)
        ):
            return LegBytes(0, 0)
        return secure.legs(len(inquiry.cohort))

    def try_out(self, inquiry: Inquiry) -> list[Outcome]:
        """The outcome of the first client with samples, whose update is not used; empty if nobody has any."""
        probe = next((c for c, w in inquiry.works.items() if w.samples), None)
        if probe is None:
            return []
        message = inquiry.message
        chunk = Chunk([probe], message.each, {probe: self.states.get(probe)}, rows=message.own([probe]))
        (result,) = self.engine.map("run", inquiry.broadcast, [chunk])
        return list(result.outcomes)

    def _cut(self, inquiry: Inquiry) -> tuple[list[slice], list[float]]:
        """Where the cohort is cut into chunks, and what each chunk costs, relative to the others."""
        works = inquiry.works
        work = [1.0 + works[c].steps * works[c].batch for c in inquiry.clients]
        wish = self.chunks or (max(1, len(work) // self.crowd) if self.crowd else 0)
        spans = cut(work, wish, self.context.layout.size)
        return spans, [sum(work[span]) for span in spans]

    def _chunk(self, inquiry: Inquiry, span: slice) -> Chunk:
        """A run of the cohort, with its clients' parts of the message and their states."""
        ids, message, works = inquiry.clients[span], inquiry.message, inquiry.works
        return Chunk(
            clients=ids,
            each={c: message.each[c] for c in ids if c in message.each},
            states={c: s for c in ids if (s := self.states.get(c))},
            steps={c: works[c].steps for c in ids if works[c].short},
            rows=message.own(ids),
            turns={c: inquiry.turns[c] for c in ids} if inquiry.turns is not None else {},
        )

    def _broadcast(self, message: Message, fold: Fold, task: str, index: int) -> Broadcast:
        """What all clients of an exchange share, under the policy for BatchNorm statistics."""
        kinds, shared, share_buffers = fold_kinds(fold), message.shared, self.context.share_buffers
        if "buffers" in message.rows and task == "fit":
            kinds.setdefault("buffers", ("stack",))
        if "buffers" in shared.arrays:
            if share_buffers and task == "fit" and not self.context.own_buffers:
                kinds.setdefault("buffers", ("mean",))
            elif not share_buffers:
                shared = Payload({k: v for k, v in shared.arrays.items() if k != "buffers"}, shared.values)
        if self.landing is not None:
            said = self.landing.values | self.landing.weighted(kinds, task)
            kinds, secure = self.landing.release.kinds(kinds, task), self.landing.release.secure
            if secure is not None and secure.hidden(said):
                kinds[WEIGHT] = ("sum",)
            if self.landing.release.masks_bits(kinds, task):
                kinds[FITS] = ("sum",)
            if kinds and said:
                shared = Payload(shared.arrays, {**shared.values, **said})
            if kinds and not message.keep:
                about = (self.context.seed, index, self.context.layout)
                shared = packed_down(self.landing.release, shared, task, *about)
        return Broadcast(index, task, shared, kinds, message.standing, message.keep)

    def _works(self, clients: Sequence[int], index: int) -> dict[int, Work]:
        """What each client is asked to do; worked out once for all of a size where they are alike."""
        local, seed, kinds = self.context.local, self.context.seed, self.context.kinds
        sizes = {c: int(self.context.sizes[c]) for c in clients}
        if (others := self.context.unlabelled) is not None:  # who has no labels works on what it has
            sizes = {c: n or int(others[c]) for c, n in sizes.items()}
        if kinds:
            return {c: work_of(kinds.local(c), n, seed, index, c) for c, n in sizes.items()}
        if local.min_epochs is not None:
            return {c: work_of(local, n, seed, index, c) for c, n in sizes.items()}
        alike = {n: work_of(local, n, seed, index, 0) for n in set(sizes.values())}
        return {c: alike[n] for c, n in sizes.items()}


def _enforce(policy: FailureConfig, outcomes: Sequence[Outcome], round: int) -> None:
    """Stop the run where ``failures`` says so, naming the client."""
    for o in outcomes:
        stop = (o.kind == "failed" and policy.policy == "stop") or (
            o.kind == "nonfinite" and policy.nonfinite == "stop"
        )
        if stop:
            setting = "policy" if o.kind == "failed" else "nonfinite"
            error = ClientError(
                f"client {o.client} {o.kind} in round {round + 1}: {o.reason.strip()}\n"
                f"(failures.{setting}=skip goes on without such clients)"
            )
            # its own traceback at the end of this one: a post-mortem debugger then stands in the client's code
            raise error.with_traceback(o.error.__traceback__ if o.error else None) from o.error
