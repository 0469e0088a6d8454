"""FedMatch. Jeong, Yoon, Yang, Hwang: Federated Semi-Supervised Learning with Inter-Client Consistency and Disjoint
Learning, ICLR 2021 (Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.base import Client
from clients.fedmatch import FedMatchClient, Sparse, sent_psi
from fedsim.config.schema import ClientConfig
from fedsim.data.local import Batch
from fedsim.errors import ConfigError
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.local.job import Job
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.vectors import Weights
from strategies.base import State, check
from strategies.semisupervised import ServerTrains, pseudo_shares

SCHEDULES = ("keep", "code")


def ids(clients: Sequence[Any]) -> Tensor:
    """Clients' ids as the state holds them: like all of it in floating point, which is exact for whole numbers."""
    return torch.tensor(clients, dtype=torch.float64)


def nearest(clients: Sequence[float], embeddings: Tensor, count: int) -> list[list[float]]:
    """Of each of ``clients``, ascending, the ``count`` others whose ``embeddings`` (n, C) are nearest; ties: lower
    ids."""
    far = torch.cdist(embeddings.double(), embeddings.double(), compute_mode="donot_use_mm_for_euclid_dist")
    far.fill_diagonal_(torch.inf)
    order = far.argsort(dim=1, stable=True)[:, : min(count, len(clients) - 1)]
    return [[clients[i] for i in row] for row in order.tolist()]


def _check_numbers(name: str, given: Mapping[str, float] | None, least: Mapping[str, float]) -> None:
    """Refuse other keys than those of ``least``, and numbers below."""
    if given is None:
        return
    check(set(given) == set(least), name, dict(given), f"give {' and '.join(least)}")
    for key, number in least.items():
        check(given[key] >= number, f"{name}.{key}", given[key], f"must be at least {number:g}")


@dataclass(kw_only=True)
class FedMatch(ServerTrains):
    """Clients train ``sigma`` on labels and ``psi`` without, the model being their sum; the server averages both.

    State: ``w`` (d,) the sum, ``psi`` (d,); of the clients ``seen`` so far, ids (n,), ``peers`` (n, d), their psi, and
    ``embeddings`` (n, C); ``helpers_of`` (k, H), for each of ``named`` (k,), who helps it, as ids. Every
    ``helpers_every`` rounds each client seen before gets the ``helpers`` nearest others; between those rounds it keeps
    them (``schedule=keep``) or has none (``code``). Where the server has the labels, sigma is trained there alone.

    ``sparse`` ``{small, change}``: entries of psi of at most ``small`` count as zero and do not travel, nor do moves of
    sigma and psi of at most ``change``: what is left travels with its places. ``plateau`` ``{patience, factor}``: where
    the loss on the validation set (``evaluation.validation``) has not fallen below its lowest for ``patience`` rounds,
    the learning rate of clients and server is divided by ``factor``; state ``plateau`` (3,): that loss, rounds since,
    and what the rate is multiplied by.
    """

    traits: ClassVar[Traits] = replace(ServerTrains.traits, asked_only=False)
    statistics: ClassVar[frozenset[str]] = frozenset({"embedding"})
    confidence: float
    lam_s: float
    lam_i: float
    lam_a: float
    lam_1: float
    lam_2: float
    mu: int
    psi_start: float
    helpers: int
    helpers_every: int
    schedule: str = "keep"
    strong: str = "strong"
    sparse: Mapping[str, float] | None = None
    plateau: Mapping[str, float] | None = None
    size: int = field(init=False, default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse is not None:
            self.traits = replace(self.traits, sparse=True)  # type: ignore[misc]

    def setup(self, task: Task, layout: Layout) -> None:
        """How long a vector is without padding."""
        self.size = layout.size

    def make_client(self) -> Client:
        """Both parts in turn."""
        check(0 <= self.confidence <= 1, "confidence", self.confidence, "probabilities lie in [0, 1]")
        for name in ("lam_s", "lam_i", "lam_a", "lam_1", "lam_2", "psi_start", "helpers"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("mu", "helpers_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        check(self.schedule in SCHEDULES, "schedule", self.schedule, f"choose one of {', '.join(SCHEDULES)}")
        _check_numbers("sparse", self.sparse, {"small": 0.0, "change": 0.0})
        _check_numbers("plateau", self.plateau, {"patience": 1.0, "factor": 1.0})
        names = ("weighting", "confidence", "lam_s", "lam_i", "lam_a", "lam_1", "lam_2", "mu", "strong")
        self.cut = None if self.sparse is None else Sparse(**self.sparse)
        return FedMatchClient(
            **{n: getattr(self, n) for n in names}, embeds=self.helpers > 0, sparse=self.cut
        )

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """Single vectors only where clients help each other."""
        if not self.helpers:
            return {"delta": "mean", "psi": "mean"}
        return {"delta": "mean", "psi": ("mean", "stack"), "embedding": "stack"}

    def check_run(self, local: ClientConfig, *, server: bool, validation: bool) -> None:
        """A plateau is one of the loss on validation samples."""
        if self.plateau is not None and not validation:
            raise ConfigError(
                "strategy.plateau goes by the loss on validation samples, and there are none; type "
                "evaluation.validation=0.1"
            )

    def init(self, server: Server) -> State:
        """``sigma`` is the initial model, ``psi`` a share of another draw (of the same one, if that was handed
        over)."""
        self.check_run(server.local, server=server.data is not None, validation=server.validator is not None)
        state = super().init(server)
        psi = self.psi_start * (server.start.w if server.fresh is None else server.fresh(0).w)
        state |= {"w": state["w"] + psi, "psi": psi if self.cut is None else self.cut.kept(psi)}
        if self.plateau is not None:
            state["plateau"] = torch.tensor([torch.inf, 0.0, 1.0], dtype=torch.float64)
        if self.helpers:
            state |= {"seen": ids([]), "named": ids([]), "helpers_of": ids([])}
        return state

    def message(self, state: State, round: Round) -> Message:
        """The sum and psi; to a client with helpers their psi."""
        arrays = dict(super().message(state, round).shared.arrays)
        each, due = dict[int, Payload](), round.index % self.helpers_every == 0
        if self.helpers and (due or self.schedule == "keep"):
            place = {c: i for i, c in enumerate(state["seen"].tolist())}
            theirs = dict(zip(state["named"].tolist(), state["helpers_of"].tolist(), strict=True))
            for client in round.cohort:
                if helpers := theirs.get(client):
                    each[client] = Payload.of(self._helping(state["peers"][[place[c] for c in helpers]]))
        values = {} if self.plateau is None else {"pace": float(state["plateau"][2])}
        psi = {"psi": state["psi"]} if self.cut is None else sent_psi("psi", state["psi"], self.size)
        return Message.of({**arrays, **psi}, values, each=each)

    def _helping(self, psi: Tensor) -> dict[str, Tensor]:
        """Helpers' psi (H, d) as they travel."""
        if self.cut is None:
            return {"helpers": psi}
        return {k: v for i, one in enumerate(psi) for k, v in sent_psi(f"helper/{i}", one, self.size).items()}

    def round(self, server: Server, state: State, round: Round) -> State:
        """As ever; then what the validation set says of the learning rate."""
        state = super().round(server, state, round)
        if self.plateau is None:
            return state
        found = server.on("val").evaluate(Weights(state["w"], state["buffers"]))
        lowest, waited, pace = state["plateau"].tolist()
        if found["loss"] < lowest:
            lowest, waited = found["loss"], 0
        else:
            waited += 1
        if waited >= self.plateau["patience"]:
            waited, pace = 0, pace / self.plateau["factor"]
        return state | {"plateau": torch.tensor([lowest, waited, pace], dtype=torch.float64)}

    def trained(self, server: Server, state: State, purpose: str = "train", lr: float | None = None) -> State:
        """The server's own training, at the same pace as the clients'."""
        if self.plateau is not None:
            lr = (server.local.lr if lr is None else lr) * float(state["plateau"][2])
        return super().trained(server, state, purpose, lr)

    def clients_round(self, server: Server, state: State, round: Round) -> State:
        """Helpers are chosen before the clients are asked, and forgotten if nobody answers."""
        asked = state
        if self.helpers and round.index % self.helpers_every == 0 and len(state["seen"]) > 1:
            chosen = nearest(state["seen"].tolist(), state["embeddings"], self.helpers)
            asked = state | {"named": state["seen"], "helpers_of": ids(chosen)}
        moved = super().clients_round(server, asked, round)
        return state if moved is asked else moved

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Both parts move along their mean updates."""
        replies.log.update(pseudo_shares(replies.ok))
        step, psi = self.aggregate(replies), self.aggregate(replies, "psi")
        moved = state["psi"] + self.server_lr * psi
        new = state | {
            "w": state["w"] + self.server_lr * step,
            "psi": moved if self.cut is None else self.cut.kept(moved),
        }
        return new | self._noted(state, replies) if self.helpers else new

    def _noted(self, state: State, replies: Replies) -> State:
        """What is known of clients, with those that answered."""
        psi, embedding = state["psi"] + replies.stack("psi"), replies.stack("embedding")
        known = {c: (state["peers"][i], state["embeddings"][i]) for i, c in enumerate(state["seen"].tolist())}
        known |= {c: (psi[i], embedding[i]) for i, c in enumerate(replies.clients)}
        seen = sorted(known)
        return {
            "seen": ids(seen),
            "peers": torch.stack([known[c][0] for c in seen]),
            "embeddings": torch.stack([known[c][1] for c in seen]),
        }

    def server_step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """A step of sigma, psi staying as it is."""
        task = job.task
        return job.descend(w, batch, loss=lambda output, y: self.lam_s * task.loss(output, y))
