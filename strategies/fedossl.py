"""FedoSSL. Zhang, Guo, Xu, Guo, Luo, Guo: Towards Unbiased Training in Federated Open-world Semi-supervised Learning,
ICML 2023."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.base import Client
from clients.fedossl import FedoSSLClient
from clients.openworld import FORMS, PARTNERS, OpenObjective
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import ClientQuestion, Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from strategies.aggregators import is_mean
from strategies.base import State, check
from strategies.centroids import aligned, global_centroids, unit_rows
from strategies.fedavg import FedAvg

log = logging.getLogger(__name__)

UNIT = 1.01  # length of a unit vector, at most, however it was rounded
_WITHOUT_R = dict.fromkeys(("tau", "form"), ("beta", (0, 0.0)))
_OF_CALIBRATION = (
    "ce_weight",
    "cluster_weight",
    "hard",
    "cal_start",
    "ce_start",
    "centroids",
    "memory",
    "server_steps",
    "min_count",
    "cache_centroids",
)


@dataclass(kw_only=True)
class FedoSSL(FedAvg):
    """Clients with labels of some classes learn these, and find the classes nobody has labelled.

    FedAvg on the losses of ``clients.openworld.OpenObjective``. Beside the model clients send centroids of their
    features; the server makes one centroid per class of them, in an order in which ids of seen classes are their
    labels, and local training is calibrated to those. ``gamma=0`` and ``beta=0`` are Fed-AO (ORCA under FedAvg):
    nothing but the model travels then.

    ``cache_centroids``: the last centroids of clients that are absent count as well. ``bn=local``: BatchNorm statistics
    stay with their clients, as in the authors' code.
    """

    traits: ClassVar[Traits] = replace(
        FedAvg.traits,
        features=True,
        labels=True,
        unread={**_WITHOUT_R, **dict.fromkeys(_OF_CALIBRATION, ("gamma", (0, 0.0)))},
    )
    statistics: ClassVar[frozenset[str]] = frozenset({"centroids", "rows", "means", "present"})
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    tau: float = 0.2
    form: str = "printed"
    margin: bool = True
    entropy: bool = True
    hard: bool = False
    ce_weight: float = 1.0
    cluster_weight: float = 1.0
    cal_start: int = 5
    ce_start: int | None = None
    partner: str = "nearest"
    view: str = "weak"
    centroids: int = 32
    memory: int = 1024
    server_steps: int = 500
    min_count: int = 2
    cache_centroids: bool = False
    bn: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bn in ("average", "local"), "bn", self.bn, "choose average or local")
        if self.bn == "local":
            self.traits = replace(self.traits, buffers="local")  # type: ignore[misc]

    def setup(self, task: Task, layout: Layout) -> None:
        """Say what a robust rule does not cover."""
        if self.gamma and not is_mean(self.aggregator):
            log.warning(
                "aggregator: it rules over the models alone; centroids and class means of FedoSSL's clients reach the "
                "server one by one, so a hostile one can move the global centroids. strategy.gamma=0 sends none"
            )

    def make_client(self) -> Client:
        """SGD on the open-world objective."""
        for name in ("alpha", "beta", "gamma", "ce_weight", "cluster_weight"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "a weight must not be negative")
        check(0 < self.tau <= 1, "tau", self.tau, "must lie in (0, 1]")
        check(self.form in FORMS, "form", self.form, f"choose one of {', '.join(FORMS)}")
        check(self.partner in PARTNERS, "partner", self.partner, f"choose one of {', '.join(PARTNERS)}")
        for name in ("centroids", "memory", "cal_start"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("server_steps", "min_count"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        check(self.memory >= self.centroids, "memory", self.memory, "centroids are rows of it; give more")
        late = self.cal_start if self.ce_start is None else self.ce_start
        check(late >= self.cal_start, "ce_start", late, "must not come before cal_start")
        names = vars(OpenObjective()).keys()
        self.objective = OpenObjective(**{name: getattr(self, name) for name in names})
        return FedoSSLClient(
            weighting=self.weighting,
            objective=self.objective,
            centroids=self.centroids,
            memory=self.memory,
            min_count=self.min_count,
            view=self.view,
            cal_start=self.cal_start,
            ce_start=late,
        )

    @property
    def fold(self) -> Fold:  # type: ignore[override]
        """The mean update; with calibration the clients' centroids one by one, and sums of their classes' means."""
        fold: dict[str, Any] = {"delta": "mean"}
        if self.objective.calibrates:
            fold |= {"centroids": "stack", "rows": "stack", "means": "sum", "present": "sum"}
        return fold

    def objection(self, asked: ClientQuestion, update: Payload) -> str:
        """Centroids or means longer than unit vectors make, a number of them that cannot be, classes half there."""
        for name in ("centroids", "means"):
            rows = update.arrays.get(name)
            if rows is not None and bool((rows.norm(dim=1) > UNIT).any()):
                return f"'{name}' has rows longer than 1, expected unit vectors or their means"
        count, present = (update.arrays.get(name) for name in ("rows", "present"))
        if count is not None and float(count) not in range(self.centroids + 1):
            return f"'rows' is {float(count):g}, expected a number of centroids, up to {self.centroids}"
        wrong = present is not None and not bool(((present == 0) | (present == 1)).all())
        return "'present' holds other numbers than 0 and 1" if wrong else ""

    def message(self, state: State, round: Round) -> Message:
        """The model, and the global centroids once there are any."""
        names = [k for k in ("w", "buffers", "m") if k in state and len(state[k])]
        return Message.of({k: state[k] for k in names})

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """The mean model; global centroids of the local ones, seen classes first at their labels' places."""
        state = super().update(state, replies, round)
        if not self.objective.calibrates:
            return state
        local, rows = replies.stack("centroids"), replies.stack("rows").flatten()
        if self.cache_centroids:
            local, rows = self._cached(state, replies.clients, local, rows, round.num_clients)
            state |= {"cache": local, "cache/rows": rows}
        there = torch.arange(local.shape[1], device=local.device) < rows[:, None]
        counts, sums = replies.total("present"), replies.total("means")
        start = state.get("m")
        if start is None:
            start = unit_rows(len(counts), local.shape[2], local, round.rng("m"))
        m = global_centroids(local[there], start, self.server_steps)
        means = sums / counts.clamp(min=1)[:, None]
        return state | {"m": aligned(m, means, counts > 0)}

    def _cached(
        self, state: State, clients: list[int], local: Tensor, rows: Tensor, everybody: int
    ) -> tuple[Tensor, Tensor]:
        """Everybody's last centroids (m, L, D) and how many each has (m,), with those just come."""
        size = max(everybody, max(clients) + 1, len(state.get("cache", ())))
        cache, filled = local.new_zeros((size, *local.shape[1:])), rows.new_zeros(size)
        if "cache" in state:
            cache[: len(state["cache"])], filled[: len(state["cache"])] = state["cache"], state["cache/rows"]
        cache[clients], filled[clients] = local, rows
        return cache, filled

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """The model's numbers, and how right the cohort's guesses of its own unlabelled samples are."""
        found = super().evaluate(server, state)
        if server.measured_on or server.remote or not server.knows_withheld or not server.round.cohort:
            return found
        message = Message.of({k: state[k] for k in ("w", "buffers") if len(state[k])})
        replies = server.exchange(message, {"guesses": "cat"}, task="guess")
        return found | (
            server.pseudo_clusters(replies.clients, replies.cat("guesses")) if len(replies) else {}
        )
