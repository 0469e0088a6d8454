"""CFL. Sattler, Müller, Samek: Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization Under
Privacy Constraints, IEEE TNNLS 2020 (Algorithms 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchange.payload import Payload, Replies
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from strategies.base import State, check
from strategies.clustered import Clustered, moved
from strategies.clusters import bipartition, cosines, separation

Halves = tuple[list[int], list[int]]
DEFAULTS = {"relative": (6, 10), "absolute": (3, 21)}  # criterion: min_size, first_round


def update_norms(deltas: Tensor) -> tuple[float, float]:
    """``|mean delta|`` and ``max |delta_i|`` of updates (n, d)."""
    x = deltas.double()
    return float(x.mean(0).norm()), float(x.norm(dim=1).max())


@dataclass(frozen=True)
class Criterion:
    """When a cluster is split.

    ``relative``: ``|u| < ratio max |delta_i|`` of the mean update ``u``, and the mean cosine inside the halves exceeds
    that across by more than ``separation``. ``absolute`` (the paper's): ``|u| < eps1`` and ``max |delta_i| > eps2``,
    which depend on the model and the local work. Both: at least ``min_size`` members.
    """

    kind: str
    ratio: float
    separation: float
    eps1: float
    eps2: float
    min_size: int

    def halves(self, deltas: Tensor, proposed: Halves | None = None) -> tuple[float, Halves] | None:
        """The separation and the two halves, as rows of the members' updates (n, d); ``None``: no split.

        ``proposed``: halves found before, taken if they too lie so far apart; ``None``: those of these updates.
        """
        if len(deltas) < max(2, self.min_size):
            return None
        mean, most = update_norms(deltas)
        small = mean < self.ratio * most if self.kind == "relative" else mean < self.eps1 and most > self.eps2
        if not small:
            return None
        similarity = cosines(deltas)
        halves = bipartition(similarity)
        apart = separation(similarity, *halves)
        if proposed is not None:
            halves, apart = proposed, min(apart, separation(similarity, *proposed))
        return None if self.kind == "relative" and apart <= self.separation else (apart, halves)


@dataclass(kw_only=True)
class CFL(Clustered):
    """One cluster at first; a cluster whose members pull apart is split in two, for good.

    ``criterion`` with ``ratio``, ``separation`` or ``eps1``, ``eps2``; ``min_size`` (``None``: 6, absolute 3): see
    ``Criterion``. ``confirm`` (relative): the halves that are taken are those of the round before, which have to be as
    far apart now; updates of one round may lie apart by chance. ``first_round`` (``None``: 10, absolute 21): no split
    before. ``max_clusters``: at most so many; the largest separation goes first. A split needs an update of every
    member not older than ``stale`` rounds; 0: all take part. Members weigh ``base.weighting``, by default all the same.
    """

    traits: ClassVar[Traits] = Traits(
        asked_only=True,
        counts_clients=True,
        discloses="CFL looks at single updates to find clusters, and only sums are private; type strategy=fedavg",
        unread=dict.fromkeys(("ratio", "separation", "confirm"), ("criterion", ("absolute",)))
        | dict.fromkeys(("eps1", "eps2"), ("criterion", ("relative",))),
    )
    choice: ClassVar[str] = "cosine"
    criterion: str
    ratio: float
    separation: float
    confirm: bool
    eps1: float
    eps2: float
    min_size: int | None
    first_round: int | None
    max_clusters: int | None
    stale: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.criterion in DEFAULTS, "criterion", self.criterion, f"choose one of {', '.join(DEFAULTS)}")
        size, first = DEFAULTS[self.criterion]
        size = size if self.min_size is None else self.min_size
        check(size >= 2, "min_size", size, "a cluster of fewer than 2 cannot be split")
        most = self.max_clusters
        check(most is None or most >= 1, "max_clusters", most, "at least one, or null")
        check(self.stale >= 0, "stale", self.stale, "must not be negative")
        self.rule = Criterion(self.criterion, self.ratio, self.separation, self.eps1, self.eps2, size)
        self.from_round = first if self.first_round is None else self.first_round
        self.confirms = self.confirm and self.criterion == "relative"

    def check_cohort(self, size: int, most: int) -> None:
        """Also refuse cohorts in which never everybody has a fresh update."""
        super().check_cohort(size, most)
        if self.stale == 0 and size < most:
            raise ConfigError(
                f"strategy=cfl needs clients_per_round=num_clients, since a split compares all members (here {size} of "
                f"{most}); or type strategy.stale=20, which compares updates of up to 20 rounds ago"
            )

    def init(self, server: Server) -> State:
        """Adds the clusters' mean updates ``directions`` (k, d), each client's half ``proposed`` (m,) in the last round
        (-1: none), and with ``stale`` every client's last update."""
        state = super().init(server)
        state["directions"] = torch.zeros_like(state["centres"])
        state["last_split"] = torch.tensor(0.0, dtype=torch.float64)
        if self.confirms:
            state["proposed"] = torch.full_like(state["assignment"], -1.0)
        if self.stale:
            m = len(server.sizes)
            state["updates"] = state["w"].new_zeros(m, len(state["w"]))
            state["updated"] = torch.full((m,), -float(self.stale) - 1, dtype=torch.float64)
        return state

    def offered(self, server: Server, state: State, cluster: int | None) -> Payload:
        """With all centres also the clusters' mean updates."""
        found = super().offered(server, state, cluster)
        return found if cluster is not None else Payload({**found.arrays, "directions": state["directions"]})

    def round(self, server: Server, state: State, round: Round) -> State:
        """Training and means in every cluster, then splits."""
        before, replies = state, self.train(server, state, round.cohort)
        if not len(replies):
            return self.settled(server, state)
        assignment = state["assignment"]
        clusters = {c: int(assignment[c]) for c in replies.clients}
        centres, buffers = self.averaged(server, state, replies, clusters)
        directions, deltas = state["directions"].clone(), replies.stack("delta")
        for j in sorted(set(clusters.values())):
            directions[j] = deltas[[i for i, c in enumerate(replies.clients) if clusters[c] == j]].mean(0)
        state = state | {"centres": centres, "centre_buffers": buffers, "directions": directions}
        if self.stale:
            who = torch.tensor(replies.clients)
            state["updates"] = state["updates"].index_copy(0, who, deltas)
            state["updated"] = state["updated"].index_fill(0, who, float(round.index))
        if round.index + 1 >= self.from_round - self.confirms:
            state = self._split(state, replies, round)
        return self.settled(server, before, **state)

    def _split(self, state: State, replies: Replies, round: Round) -> State:
        """The state after all splits that are due, those of the largest separation first."""
        due = []
        state = dict(state)
        if self.confirms:  # a checkpoint of before has none
            held = state.get("proposed")
            state["proposed"] = torch.full_like(state["assignment"], -1.0) if held is None else held.clone()
        for j in range(len(state["centres"])):
            members = torch.nonzero(state["assignment"] == j).flatten().tolist()
            deltas = self._updates(state, replies, members, round.index)
            found = None if deltas is None else self._halves(state.get("proposed"), members, deltas)
            if found is not None and deltas is not None:
                apart, (first, second) = found
                due.append(
                    (
                        apart,
                        [[members[i] for i in half] for half in (first, second)],
                        [deltas[half].mean(0) for half in (first, second)],
                    )
                )
        for _, halves, means in sorted(due, key=lambda d: -d[0]):
            new = len(state["centres"])
            if self.max_clusters is not None and new >= self.max_clusters:
                break
            j = int(state["assignment"][halves[0][0]])
            if self.confirms:
                state["proposed"][halves[0] + halves[1]] = -1.0
            directions = torch.cat([state["directions"], means[1][None]])
            directions[j] = means[0]
            state = state | {
                "centres": torch.cat([state["centres"], state["centres"][j : j + 1]]),
                "centre_buffers": torch.cat([state["centre_buffers"], state["centre_buffers"][j : j + 1]]),
                "directions": directions,
                "assignment": moved(state["assignment"], ((c, new) for c in halves[1])),
                "last_split": torch.tensor(float(round.index + 1), dtype=torch.float64),
            }
        return state

    def _halves(
        self, proposed: Tensor | None, members: Sequence[int], deltas: Tensor
    ) -> tuple[float, Halves] | None:
        """What the criterion says of a cluster; ``proposed`` (m,) gets its halves of this round, for the next."""
        if proposed is None:
            return self.rule.halves(deltas)
        sides = proposed[list(members)].tolist()
        first, second = ([i for i, side in enumerate(sides) if side == half] for half in (0.0, 1.0))
        if len(members) > 1:
            for half, rows in enumerate(bipartition(cosines(deltas))):
                proposed[[members[i] for i in rows]] = float(half)
        known = first and second and len(first) + len(second) == len(members)
        return self.rule.halves(deltas, (first, second)) if known else None

    def _updates(self, state: State, replies: Replies, members: Sequence[int], index: int) -> Tensor | None:
        """Updates (n, d) of all ``members``; ``None`` if one's is missing or too old."""
        if self.stale:
            fresh = bool((state["updated"][list(members)] >= index - self.stale).all())
            return state["updates"][list(members)] if fresh and members else None
        rows = {c: i for i, c in enumerate(replies.clients)}
        if not members or any(c not in rows for c in members):
            return None
        return replies.stack("delta")[[rows[c] for c in members]]
