"""What methods share that learn from samples without labels: a log of the pseudo labels, and a server that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.data.local import Batch
from fedsim.exchange.payload import Outcome, Replies
from fedsim.local.job import Job
from fedsim.local.optimiser import LocalSteps
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.vectors import Weights
from strategies.base import State, check
from strategies.fedavg import FedAvg

SHARES = {"from_global": "global_share", "agree": "agree_share", "right": "accuracy"}  # of those kept
OF_SOME = frozenset(  # metrics of clients that have samples without labels, or keep some
    {f"pseudo/{name}" for name in ("seen", "kept", "most_frequent", "from_global", "agree", "nan")}
    | {f"unlabelled/{name}" for name in ("train_loss", "steps", "clipped")}
)


def pseudo_shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the pseudo labels of a cohort come to: ``pseudo/kept_share`` of the samples looked at; of those kept,
    ``global_share``, ``agree_share``, ``most_frequent_share`` (of each client's most frequent class) and ``accuracy``,
    which the evaluator alone can tell. Empty where nobody looked."""

    def total(name: str) -> float:
        return sum(o.metrics.get(f"pseudo/{name}", 0.0) for o in outcomes)

    having = {k for o in outcomes for k in o.metrics}
    seen, kept = total("seen"), total("kept")
    if not seen:
        return {}
    out = {"pseudo/kept_share": kept / seen}
    if kept:
        out["pseudo/most_frequent_share"] = total("most_frequent") / kept
        out |= {f"pseudo/{v}": total(k) / kept for k, v in SHARES.items() if f"pseudo/{k}" in having}
    return out


@dataclass(kw_only=True)
class SemiSupervised(FedAvg):
    """FedAvg whose clients also learn from samples without labels, and say in the round's row how."""

    traits: ClassVar[Traits] = replace(
        FedAvg.traits, labels=True, labelled="any", unlabelled=True, metrics=OF_SOME
    )
    weightings: ClassVar[tuple[str, ...]] = ("samples", "uniform")

    def __post_init__(self) -> None:
        check(self.server_lr > 0, "server_lr", self.server_lr, "must be positive")
        known = self.weightings
        check(self.weighting in known, "weighting", self.weighting, f"choose one of {', '.join(known)}")
        self.client = self.make_client()

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move along the mean update."""
        replies.log.update(pseudo_shares(replies.ok))
        return super().update(state, replies, round)


@dataclass(kw_only=True)
class ServerTrains(SemiSupervised):
    """The same where the server may hold the labels: after each round it trains on its own samples, also if nobody
    answered.

    ``server_epochs`` passes with the settings of group ``client`` in the weak view (``weak``: its name, or none);
    ``warmup_rounds`` such trainings come before round 1, equal parts of them at each of ``warmup_lr``. ``sbn``: running
    statistics are then those of one pass over the server's samples. Without samples at the server nothing of this
    happens.
    """

    traits: ClassVar[Traits] = SemiSupervised.traits
    keeps_moments: ClassVar[bool] = False  # the server's momentum goes on from round to round
    weak: str | None = "weak"
    server_epochs: int = 5
    server_batch: int | None = None
    warmup_rounds: int = 1
    warmup_lr: float | Sequence[float] | None = None
    sbn: str | None = None

    def __post_init__(self) -> None:
        check(self.server_epochs >= 1, "server_epochs", self.server_epochs, "must be at least 1")
        check(self.warmup_rounds >= 0, "warmup_rounds", self.warmup_rounds, "must not be negative")
        check(all(lr > 0 for lr in listed(self.warmup_lr)), "warmup_lr", self.warmup_lr, "must be positive")
        batch = self.server_batch
        check(
            batch is None or batch >= 1,
            "server_batch",
            batch,
            "must be at least 1, or null: client.batch_size",
        )
        check(self.sbn in (None, "server"), "sbn", self.sbn, "choose server, or null")
        super().__post_init__()

    def round(self, server: Server, state: State, round: Round) -> State:
        """Before round 1 the server alone; then clients, then the server."""
        return self.trained(server, self.clients_round(server, self.warmed(server, state, round), round))

    def server_step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One step of the server's own training on ``w`` (d,)."""
        return job.descend(w, batch)

    def server_rule(self, job: Job) -> Callable[[Tensor, Batch], Tensor]:
        """The step ``(w, batch) -> w`` of one training; what is constant in it is worked out here."""
        return partial(self.server_step, job)

    def clients_round(self, server: Server, state: State, round: Round) -> State:
        """What the clients make of the model."""
        return super().round(server, state, round)

    def warmed(self, server: Server, state: State, round: Round) -> State:
        """``state`` as clients meet it: in round 1 the server has trained before."""
        rates, count = listed(self.warmup_lr), self.warmup_rounds if round.index == 0 else 0
        for i in range(count):
            lr = rates[i * len(rates) // count] if rates else None
            state = self.trained(server, state, f"warmup/{i}", lr)
        return state

    def trained(self, server: Server, state: State, purpose: str = "train", lr: float | None = None) -> State:
        """``state`` after the server's own training, if it has samples; ``lr`` instead of the clients'."""
        if server.bench is None:
            return state
        local = (
            server.local if self.server_batch is None else replace(server.local, batch_size=self.server_batch)
        )
        local = local if lr is None else replace(local, lr=lr)
        kept = State()

        def fit(job: Job) -> Tensor:
            w, step = job.start(), self.server_rule(job)
            if self.keeps_moments:
                _moved_on(job.sgd, state)
            for batch in job.batches(epochs=self.server_epochs):
                w = step(w, batch if self.weak is None else job.view(self.weak, batch))
            if self.sbn is not None and len(job.model.buffers):
                rows = torch.split(torch.arange(len(job.data)), job.local.batch_size)
                job.model.collect_statistics(job.data.read(r).x for r in rows)
            if self.keeps_moments:
                kept.update(_moments(job.sgd))
            return w

        weights = Weights(state["w"], state["buffers"])
        found, report = server.bench.train(weights, fit, server.round.index, local, purpose)
        if "train_loss" in report:
            server.log["server/train_loss"] = report["train_loss"]
        return state | found._asdict() | kept


def listed(value: Any) -> list[Any]:
    """A list of one, or of several; of ``None`` an empty one."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _moments(sgd: LocalSteps) -> State:
    """Momentum, or Adam's moments and steps, for the server's state."""
    found = State()
    if sgd.momentum is not None:
        found["server_momentum"] = sgd.momentum.detach().cpu().clone()
    if sgd.moments is not None:
        first, second = (t.detach().cpu().clone() for t in sgd.moments)
        found |= {"server_first": first, "server_second": second, "server_steps": sgd.adam_steps}
    return found


def _moved_on(sgd: LocalSteps, state: State) -> None:
    """``sgd`` as it was when the server last trained."""
    if "server_momentum" in state:
        sgd.momentum = state["server_momentum"].clone()
    if "server_first" in state:
        sgd.moments = state["server_first"].clone(), state["server_second"].clone()
        sgd.adam_steps = int(state["server_steps"])


@dataclass(kw_only=True)
class ServerOnly(ServerTrains):
    """The reference: the server trains on its labelled samples, and nobody is asked for anything."""

    traits: ClassVar[Traits] = replace(ServerTrains.traits, labels=False, labelled="server", unlabelled=False)
    server_lr: float = 1.0  # of clients, whom nobody asks
    weighting: str = "samples"

    def clients_round(self, server: Server, state: State, round: Round) -> State:
        """Nothing."""
        return state
