"""GGEUR. Dai, Wang, Zhang, et al.: Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated
Learning, CVPR 2025 (arXiv 2503.06457; equations 4 and 5, algorithms 1 and 2). A wrapper around any other strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from clients.generated import FILLS, augment
from clients.geometry import (
    BOOSTS,
    SCALES,
    ClassStatistics,
    absent_classes,
    class_geometry,
    class_statistics,
    merge_statistics,
)
from clients.ggeur import Filling, GgeurClient, GgeurPrivacy, unpack
from fedsim.errors import TooFewUpdates
from fedsim.exchange.fold import Fold
from fedsim.exchange.payload import Message, Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from fedsim.task.threads import one_thread
from fedsim.task.vectors import Weights
from strategies.base import State, Strategy, check
from strategies.statistics import SAID, JudgesStatistics

__all__ = ["GGEUR", "augment", "class_geometry", "class_statistics", "merge_statistics"]

SHAPES, UNREAD = ("global", "own", "none"), {"total": ("fill", ("paper",))}
FOLD: Fold = {"n": "stack", "mean": "cat", "factor": "cat"}
LOST = ("failed", "nonfinite", "dropped")  # a client without statistics: no geometry, no training this time


@dataclass(kw_only=True)
class GGEUR(JudgesStatistics):
    """``base`` on rows filled up in the shape of the global classes.

    Phase 0, in the first round and reported apart from it: every client sends the statistics of its embeddings, the
    server merges them exactly, takes each class's eigen-directions and sends them to all. A client that missed this is
    asked when it is next sampled, and merged then.

    Args:
        base: the strategy that trains.
        target: rows per class that own rows are filled up to; ``None``: 2000, with several domains 500.
        per_prototype: rows around the class mean of every other domain.
        energy, scale, boost, jitter: see ``clients.geometry.class_geometry``; defaults as in the paper.
        coverage: see ``merge_statistics``.
        fill: ``paper``; ``pool`` or ``scripts``: a random choice up to ``total`` rows per class (see ``plan_rows``).
        total: read by these two.
        shape: ``global``; as controls ``own`` (each client's own covariance) and ``none`` (copies).
        refresh: whether late statistics renew the geometry that everybody uses; else they are only kept.
        redraw: new rows every round; else the same ones, as in the authors' code.
        renormalize: scale generated rows to unit length, for embeddings that have it.
        min_count, clip, noise: see ``clients.ggeur.GgeurPrivacy``.
        memory_mb: generated rows that a worker keeps between rounds; beyond that they are made batch by batch.
    """

    caches: ClassVar[frozenset[str]] = frozenset({"_sent"})
    traits: ClassVar[Traits] = Traits(unread=UNREAD, **SAID)
    base: Strategy
    target: int | None
    per_prototype: int
    energy: float
    scale: str
    boost: str
    jitter: float
    coverage: float
    fill: str
    total: int
    shape: str
    refresh: bool
    redraw: bool
    renormalize: bool
    min_count: int
    clip: float | None
    noise: float
    memory_mb: int
    client: GgeurClient = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        filling = Filling(**{f.name: getattr(self, f.name) for f in fields(Filling)})
        privacy = GgeurPrivacy(min_count=self.min_count, clip=self.clip, noise=self.noise)
        self.traits = replace(self.base.traits, **SAID, **privacy.traits)  # type: ignore[misc]
        self.client = GgeurClient(self.base.client, filling, privacy)

    def _check(self) -> None:
        check(isinstance(self.base, Strategy), "base", self.base, "type strategy@strategy.base=fedavg")
        fixed = self.base.traits.fixed_sizes
        check(not fixed, "base.steps", "reference", "clients' sizes change here; type own")
        for name in ("target", "per_prototype", "jitter", "noise", "memory_mb"):
            check((value := getattr(self, name)) is None or value >= 0, name, value, "must not be negative")
        for name in ("energy", "coverage"):
            check(0 < (value := getattr(self, name)) <= 1, name, value, "must lie in (0, 1]")
        for name in ("total", "min_count"):
            check((value := getattr(self, name)) >= 1, name, value, "must be at least 1")
        for name, known in (("scale", SCALES), ("boost", BOOSTS), ("fill", FILLS), ("shape", SHAPES)):
            check((value := getattr(self, name)) in known, name, value, f"choose one of {', '.join(known)}")
        check(self.clip is None or self.clip > 0, "clip", self.clip, "must be positive")
        check(not self.noise or self.clip is not None, "noise", self.noise, "needs strategy.clip")

    @property
    def folds(self) -> Fold:
        """What the base's rounds fold."""
        return self.base.folds

    def check_cohort(self, size: int, most: int) -> None:
        """The base's."""
        self._hand_over()
        self.base.check_cohort(size, most)

    def setup(self, task: Task, layout: Layout) -> None:
        """The base's."""
        self.base.setup(task, layout)

    def models(self, state: State) -> Mapping[str, Weights]:
        """The base's."""
        return self.base.models(state)

    def evaluate_clients(self, server: Server, state: State) -> dict[str, float]:
        """The base's numbers."""
        return self.base.evaluate_clients(server, state)

    def init(self, server: Server) -> State:
        """The base's state; statistics join it in phase 0."""
        return self.base.init(server)

    def evaluate(self, server: Server, state: State) -> dict[str, Any]:
        """The base's numbers; with ``evaluation.by_class`` also ``absent/accuracy``: the mean over clients of the
        accuracy of the classes that a client has no rows of."""
        out: dict[str, Any] = self.base.evaluate(server, state)
        if "class_accuracy" in out and "ggeur/absent" in state:
            each = torch.tensor(out["class_accuracy"], dtype=torch.float64)
            share = state["ggeur/absent"] * each.isfinite()  # the test set may lack a class
            if float(share.sum()):
                out["absent/accuracy"] = float(each.nan_to_num() @ share / share.sum())
        return out

    def round(self, server: Server, state: State, round: Round) -> State:
        """Phase 0 for whoever still needs it, then the base's round with the geometry at hand."""
        self._hand_over()
        cohort = list(round.cohort)
        with server.apart("phase0"):
            state, lost = self._gather(server, state, cohort)
            cohort = [c for c in cohort if c not in lost]
            standing = self._standing(state)
            if standing is None:
                return state
            state, lost = self._hand_out(server, state, cohort, standing)
            cohort = [c for c in cohort if c not in lost]
        behind = cast(Server, _WithStanding(server, standing, cohort))
        try:
            return self.base.round(behind, state, replace(round, cohort=cohort))
        except TooFewUpdates as thin:
            server.thin(str(thin), whole=True)
            return state  # phase 0 is done, whatever becomes of the round

    def _hand_over(self) -> None:
        """The configured aggregator is the base's."""
        if "aggregator" in self.__dict__ and "aggregator" not in vars(type(self.base)):
            self.base.aggregator = self.__dict__["aggregator"]

    def _gather(self, server: Server, state: State, cohort: Sequence[int]) -> tuple[State, set[int]]:
        """Statistics of clients that have not sent any: all at first, later those of the cohort."""
        known = state.get("ggeur/known")
        if known is None:
            known = torch.zeros(len(server.sizes), dtype=torch.float64)
            asked = list(server.clients)
        else:
            asked = [c for c in cohort if not known[c]]
        if not asked:
            return state, set()
        replies = server.exchange(Message(), FOLD, task="statistics", clients=asked)
        lost = {o.client for o in replies.outcomes if o.kind in LOST}
        if len(replies):
            known = known.clone()
            known[[o.client for o in replies.outcomes if o.client not in lost]] = 1
            with one_thread():
                state = self._merged(state, replies, server) | {"ggeur/known": known}
            server.log["statistics_missing"] = float(server.num_clients - (known != 0).sum())
        return state, lost

    def _merged(self, state: State, replies: Replies, server: Server) -> State:
        """The state with the statistics of ``replies`` in it, and the geometry that follows."""
        parts = unpack(replies.stack("n"), replies.cat("mean"), replies.cat("factor"), bool(self.noise))
        domains = [int(cast(int, d)) for d in replies.values("domain")]
        whole = merge_statistics([*_stored(state), *parts], coverage=self.coverage)
        state = state | {
            "ggeur/n": whole.n.double(),
            "ggeur/mean": whole.mean,
            "ggeur/factor": torch.cat([*whole.factors]),
            "ggeur/rows": torch.tensor([float(len(f)) for f in whole.factors]).double(),
        }
        state |= _by_domain(state, parts, domains)
        state["ggeur/absent"] = state.get("ggeur/absent", 0) + absent_classes(
            torch.stack([p.n for p in parts])
        )
        if "ggeur/A" in state and not self.refresh:
            return state
        with_rows = whole.n > 0
        geometry = class_geometry(
            whole, energy=self.energy, scale=self.scale, boost=self.boost, jitter=self.jitter
        )
        ranks = torch.tensor([float(p) for p in geometry.ranks]).double()
        server.log["rank_mean"] = float(ranks[with_rows].mean())
        server.log["rank_max"] = float(ranks.max())
        server.log["ranks"] = geometry.ranks
        state |= {
            "ggeur/A": torch.cat([*geometry.factors]).to(server.dtype),
            "ggeur/p": ranks,
            "ggeur/of": whole.n.double(),  # counts this geometry was made from
            "ggeur/version": state.get("ggeur/version", torch.zeros((), dtype=torch.float64)) + 1,
        }
        if "ggeur/domain_n" in state:
            state["ggeur/present"] = (state["ggeur/domain_n"] > 0).double()
            state["ggeur/prototypes"] = state["ggeur/domain_mean"].to(server.dtype)
        return state

    def _standing(self, state: State) -> Payload | None:
        """What clients hold from phase 0 on; the same object as long as it says the same."""
        if "ggeur/A" not in state:
            return None
        if (held := self.__dict__.get("_sent")) is not None and held[0] is state["ggeur/A"]:
            return cast(Payload, held[1])
        names = ("A", "p", "of") + (("present", "prototypes") if self.per_prototype else ())
        arrays = {f"ggeur/{k}": state[f"ggeur/{k}"] for k in names if f"ggeur/{k}" in state}
        values = {"ggeur/version": float(state["ggeur/version"]), "ggeur/jitter": self.jitter}
        payload = Payload.of(arrays, values)
        self.__dict__["_sent"] = state["ggeur/A"], payload
        return payload

    def _hand_out(
        self, server: Server, state: State, cohort: Sequence[int], standing: Payload
    ) -> tuple[State, set[int]]:
        """Send the geometry to those who do not hold this version: everybody at first, later those of the cohort."""
        has, everybody = state.get("ggeur/has"), torch.nonzero(state["ggeur/known"]).flatten().tolist()
        cohort = everybody if has is None else cohort
        has = torch.zeros(len(server.sizes), dtype=torch.float64) if has is None else has
        needy = [c for c in cohort if has[c] != state["ggeur/version"]]
        if not needy:
            return state, set()
        replies = server.exchange(Message(standing, keep=True), {}, task="receive", clients=needy)
        has = has.clone()
        has[replies.clients] = float(state["ggeur/version"])
        return state | {"ggeur/has": has}, set(needy) - set(replies.clients)


class _WithStanding:
    """The server as the base sees it: its exchanges carry the geometry, its cohort are the clients that have it."""

    def __init__(self, server: Server, standing: Payload, cohort: Sequence[int]):
        self._server, self._standing, self._cohort = server, standing, cohort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def exchange(
        self, message: Message, fold: Fold, *, task: str = "fit", clients: Sequence[int] | None = None
    ) -> Replies:
        """As the server's."""
        asked = self._cohort if clients is None else clients
        message = replace(message, standing=self._standing.joined(message.standing))
        return self._server.exchange(message, fold, task=task, clients=asked)


def _stored(state: State) -> list[ClassStatistics]:
    """What the state holds from earlier, if anything."""
    if "ggeur/n" not in state:
        return []
    factors = torch.split(state["ggeur/factor"], [int(r) for r in state["ggeur/rows"].tolist()])
    return [ClassStatistics(state["ggeur/n"].long(), state["ggeur/mean"], tuple(factors))]


def _by_domain(state: State, parts: Sequence[ClassStatistics], domains: Sequence[int]) -> dict[str, Tensor]:
    """Counts (D, C) and means (D, C, d) per domain, those of ``parts`` added; empty without domains."""
    if max(domains, default=-1) < 0:
        return {}
    n, mean = state.get("ggeur/domain_n"), state.get("ggeur/domain_mean")
    count = max(max(domains) + 1, 0 if n is None else len(n))
    shape = parts[0].mean.shape
    total = torch.zeros(count, shape[0], dtype=torch.float64)
    sums = torch.zeros(count, *shape, dtype=torch.float64)
    if n is not None and mean is not None:
        total[: len(n)] = n
        sums[: len(n)] = n[:, :, None] * mean
    for part, domain in zip(parts, domains, strict=True):
        if domain >= 0:
            total[domain] += part.n
            sums[domain] += part.n[:, None] * part.mean
    return {"ggeur/domain_n": total, "ggeur/domain_mean": sums / total.clamp(min=1)[:, :, None]}
