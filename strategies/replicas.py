"""Methods whose clients keep copies of the model and are sent what moved it: the log, and how one catches up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from clients.base import Client
from clients.codec import CODECS, Codes
from clients.directions import GENERATOR
from clients.replica import CURRENT, MODEL, ReplicaClient, digest
from clients.slopes import MEASURES
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Outcome, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from strategies.base import State, Strategy, check, check_weighting

log = logging.getLogger(__name__)
SLOPES = "clients measure slopes, they do not train; type strategy.lr and the other settings of strategy"
SUITING = (
    "such as 0.03 for a head of some hundred weights (fedkseed 0.003), 1e-6 for a whole language model; "
    "docs/zeroth_order.md"
)
REPLICAS = ("one", "each")
STEEPEST = 1e16  # slope that a server takes from a node


def cheaper(log_bytes: int | None, model_bytes: int) -> str:
    """How one catches up: by ``log``, or by the whole ``model`` where that is smaller, or where the log does not
    reach back far enough (``None``)."""
    return "log" if log_bytes is not None and log_bytes <= model_bytes else "model"


@dataclass(kw_only=True)
class Slopes(Strategy):
    """What methods of slopes share: the model moves by ``lr`` along directions that are drawn, not sent.

    ``replicas``: in a simulation ``one`` copy of the model for all, or ``each`` client its own, which gives the same
    bits and bytes at more cost; in a deployment each node has its own. A client starts from the initial model, which
    it builds as the server does; one that has another is sent it.
    """

    traits: ClassVar[Traits] = Traits(
        buffers="average",
        no_optimiser=SLOPES,
        no_vectors="this one changes vectors, but clients of this method send slopes; type attack=label_flip, or "
        "another strategy",
        metrics=frozenset({"saturated", "nonfinite_slopes"}),
        asked_only=True,
        discloses="clients of this method send slopes along known directions, numbers that no noise covers; type "
        "strategy=fedzo, whose clients send a change of the model, or strategy=fedavg",
    )
    fold: ClassVar[Fold] = {}
    lr: Annotated[float, SUITING]
    eps: float
    codec: str
    measure: str
    weighting: str
    replicas: str
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        check(self.lr > 0, "lr", self.lr, "must be positive")
        check(self.eps > 0, "eps", self.eps, "must be positive")
        check(self.codec in CODECS, "codec", self.codec, f"choose one of {', '.join(CODECS)}")
        check(self.measure in MEASURES, "measure", self.measure, f"choose one of {', '.join(MEASURES)}")
        check(self.replicas in REPLICAS, "replicas", self.replicas, f"choose one of {', '.join(REPLICAS)}")
        check_weighting(self.weighting)
        self.client = self.make_client()

    def make_client(self) -> ReplicaClient:
        """The local half."""
        raise NotImplementedError

    @property
    def rule(self) -> Any:
        """The local half, which knows how the model moves."""
        return self.client

    @property
    def folds(self) -> Fold:
        """Single slopes are numbers that the server reads: no vector is folded for a rule."""
        return self.fold

    def init(self, server: Server) -> State:
        """The initial model; what it will be moved along is noted among the run's facts."""
        server.facts["directions"] = GENERATOR
        return super().init(server)

    def most_weight(self, asked: ClientQuestion) -> float:
        """Weights do not travel, but those of measurements."""
        return 1.0 if asked.task == "fit" else super().most_weight(asked)

    def own_copies(self, server: Server) -> bool:
        """Whether every client has a copy of its own."""
        return server.remote or self.replicas == "each"

    def codes(self, outcome: Outcome, count: int) -> Codes | None:
        """What a client sent, ``count`` codes; ``None`` of one that says that it has nothing."""
        codec, data = CODECS[self.codec], outcome.values["slopes"]
        assert isinstance(data, bytes)
        codes = codec.unpack(data, count)
        return None if bool(codec.is_absent(codes).all()) else codes

    def name_the_blind(self, server: Server, replies: Replies, count: int, round: Round) -> None:
        """Say of which clients none of the ``count`` slopes was finite: these count as 0."""
        blind = [o.client for o in replies.ok if o.metrics.get("nonfinite_slopes", 0.0) >= count]
        if blind:
            server.log["no_finite_slope"] = blind
            log.warning(
                "round %d: no slope of clients %s was finite, so they are 0; look at their samples, strategy.lr and "
                "strategy.eps",
                round.index + 1,
                blind,
            )

    def misfit(self, update: Payload, count: int, before: int = 0) -> str:
        """Why an update cannot be ``count`` codes behind ``before`` bytes, else nothing."""
        codec, data = CODECS[self.codec], update.values.get("slopes")
        size = before + codec.nbytes(count)
        if not isinstance(data, bytes) or len(data) != size:
            found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            return f"'slopes' holds {found}, expected {size} bytes of {self.codec}"
        most = float(np.abs(codec.decode(codec.unpack(data[before:], count))).max())
        return "" if most <= STEEPEST else f"'slopes' holds {most:g}, above {STEEPEST:g}"


@dataclass(kw_only=True)
class Logged(Slopes):
    """Those whose copies follow by a log of frames.

    Every ``ckpt_every`` rounds the log is cut: it reaches back so many rounds at least, and less than twice as many.
    Who was away for longer, or whose frames would be larger than the model, is sent the model. Every ``hash_every``
    rounds (0: never) eight bytes say what the model must be; a client whose copy differs says so, and is sent the model
    when it is next asked. State: ``log``, frames in hexadecimal, from round ``log_from`` on; ``resync``, who said so.
    """

    ckpt_every: int
    hash_every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.ckpt_every >= 1, "ckpt_every", self.ckpt_every, "rounds, at least 1")
        check(self.hash_every >= 0, "hash_every", self.hash_every, "rounds, 0: never")

    def init(self, server: Server) -> State:
        """Adds an empty log."""
        return super().init(server) | {"log": [], "log_from": 0, "resync": []}

    def round(self, server: Server, state: State, round: Round) -> State:
        """Bring the clients up to date, hear their slopes, move the model and note what moved it."""
        replies = server.exchange(self.question(server, state, round), {} if server.remote else self.fold)
        lost = [o.client for o in replies.ok if self.codes(o, self.heard) is None]
        if lost:
            server.log["out_of_sync"] = lost
        self.name_the_blind(server, replies, self.heard, round)
        here = replace(replies, outcomes=[o for o in replies.ok if o.client not in lost])
        w, frame = self.advance(server, state["w"], here, round)
        log, since = [*state["log"], [part.hex() for part in frame]], state["log_from"]
        if (end := round.index + 1) % self.ckpt_every == 0 and end - self.ckpt_every > since:
            log, since = log[end - self.ckpt_every - since :], end - self.ckpt_every
        resync = sorted({c for c in state["resync"] if c not in here.clients} | set(lost))
        return state | {"w": w, "log": log, "log_from": since, "resync": resync}

    @property
    def heard(self) -> int:
        """Codes that a client sends."""
        raise NotImplementedError

    def advance(
        self, server: Server, w: Tensor, replies: Replies, round: Round
    ) -> tuple[Tensor, Sequence[bytes]]:
        """The next model (d,), and the round's frame, of the clients that had something to say."""
        raise NotImplementedError

    def wire(self, frames: Sequence[Sequence[bytes]], registered: int) -> dict[str, bytes]:
        """Frames as they travel: one object of bytes under its name; none, where there are none."""
        raise NotImplementedError

    def question(self, server: Server, state: State, round: Round) -> Message:
        """To each client what it lacks, and what all copies share."""
        w, buffers, t = state["w"], state["buffers"], round.index
        statistics = {"buffers": buffers} if len(buffers) else {}
        size, ways = server.layout.size * w.element_size(), dict[int | None, Payload]()
        each, initial = dict[int, Payload](), False
        log = [[bytes.fromhex(part) for part in frame] for frame in state["log"]]
        for c in round.cohort:
            since = None if c in state["resync"] else max(server.states.last_round(c), 0)
            initial |= since == 0
            if since is not None and since < state["log_from"]:
                since = None
            if since not in ways:
                frames = None if since is None else log[since - state["log_from"] :]
                ways[since] = self._way(w, frames, len(server.sizes), size)
            if ways[since].arrays or ways[since].values:
                each[c] = ways[since]
        values = (
            {"hash": digest(server.layout, w)} if t and self.hash_every and t % self.hash_every == 0 else {}
        )
        if self.own_copies(server):
            standing = Payload({"w": server.start.w, **statistics}) if initial else None
        else:
            standing = Payload({"w": w, **statistics}, {CURRENT: True})
        return Message(Payload({}, values), each, standing)

    def _way(
        self, w: Tensor, frames: Sequence[Sequence[bytes]] | None, registered: int, size: int
    ) -> Payload:
        """What makes today's model ``w`` of one from before ``frames``, or of any where there are none to be had."""
        wire = None if frames is None else self.wire(frames, registered)
        if wire is not None and cheaper(sum(map(len, wire.values())), size) == "log":
            return Payload({}, wire)
        return Payload({MODEL: w})
