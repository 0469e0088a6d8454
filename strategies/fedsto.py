"""FedSTO. Kim, Lin, Lee, Lee, Kwon: Navigating Data Heterogeneity in Federated Learning: A Semi-Supervised Federated
Object Detection, NeurIPS 2023 (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from clients.base import Client
from clients.detector_parts import DetectorParts
from clients.fedsto import Boxes, FedSTOClient, Orthogonality, PartLosses
from fedsim.data.local import Batch
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Message, Outcome, Replies
from fedsim.local.job import Job
from fedsim.server.exchanges import Server
from fedsim.server.round import Round
from fedsim.server.traits import Traits
from fedsim.task.layout import Layout
from fedsim.task.task import Task
from strategies.base import State, check
from strategies.semisupervised import ServerTrains, listed

PARTS = ("class", "objectness", "box")
TEACHERS = ("reset", "carry")
NORMS = ("exact", "power")


@dataclass(kw_only=True)
class FedSTO(ServerTrains):
    """Detection with labels at the server: clients train on boxes that their teachers find, then the server on its own.

    In the first ``selective_rounds`` (T1) clients train and send the ``backbone`` alone, ``B <- B + server_lr
    mean(B_k - B)``, while neck and head stay; afterwards everything, where clients and server add ``lam`` Omega, the
    distance of all other matrices from orthogonal ones. ``selective_rounds=0 lam=0`` is the baseline: pseudo labels of
    a moving average of each client, under FedAvg.
    """

    traits: ClassVar[Traits] = replace(
        ServerTrains.traits, labels=False, labelled="server", metrics=frozenset()
    )
    keeps_moments: ClassVar[bool] = True
    selective_rounds: int
    lo: float
    hi: float
    sure: float
    lam: float
    alpha: float | str
    weights: Mapping[str, float]
    decode: Callable[..., Boxes]
    losses: PartLosses
    backbone: str | Sequence[str] = "backbone.*"
    norm: str = "exact"
    teacher: str = "reset"
    strong: str | Sequence[str] = "strong"
    layout: Layout | None = field(init=False, default=None, repr=False, compare=False)

    def make_client(self) -> Client:
        """Boxes, and training on them."""
        check(self.selective_rounds >= 0, "selective_rounds", self.selective_rounds, "must not be negative")
        check(0 < self.lo <= self.hi <= 1, "lo", self.lo, f"needs 0 < lo <= hi <= 1; hi is {self.hi}")
        check(0 <= self.sure <= 1, "sure", self.sure, "probabilities lie in [0, 1]")
        check(self.lam >= 0, "lam", self.lam, "the weight of the penalty must not be negative")
        auto = self.alpha == "auto"
        good = auto or (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1)
        check(good, "alpha", self.alpha, "give a number in [0, 1], or auto")
        for name, known in (("norm", NORMS), ("teacher", TEACHERS)):
            value = getattr(self, name)
            check(value in known, name, value, f"choose one of {', '.join(known)}")
        for name in self.weights:
            check(name in PARTS, f"weights.{name}", self.weights[name], f"there are {', '.join(PARTS)}")
            check(self.weights[name] >= 0, f"weights.{name}", self.weights[name], "must not be negative")
        least = getattr(self.decode, "keywords", {}).get("score", 0.0)
        check(least < self.lo, "decode.score", least, f"must be below strategy.lo ({self.lo})")
        return FedSTOClient(
            weighting=self.weighting,
            parts=self.parts,
            orthogonal=self.orthogonal,
            lo=self.lo,
            hi=self.hi,
            sure=self.sure,
            alpha=None if auto else float(self.alpha),
            carry=self.teacher == "carry",
            weights={name: float(v) for name, v in self.weights.items()},
            decode=self.decode,
            losses_of=self.losses,
            weak=self.weak,
            strong=tuple(listed(self.strong)),
        )

    @property
    def parts(self) -> DetectorParts:
        """What is the backbone's."""
        return DetectorParts(tuple(listed(self.backbone)))

    @property
    def orthogonal(self) -> Orthogonality:
        """The penalty of the second phase."""
        return Orthogonality(self.parts, self.lam, self.norm == "exact")

    def setup(self, task: Task, layout: Layout) -> None:
        """Find the backbone in the model.

        Raises:
            ConfigError: if no parameter is the backbone's, or none that Omega could be of is outside it.
        """
        self.layout = layout
        self.parts.backbone(layout)
        if self.lam and not self.parts.matrices(layout):
            raise ConfigError(
                f"strategy.backbone={self.backbone}: no weight matrix is left outside it for Omega; type "
                "strategy.backbone=PATTERN of the backbone's names alone, or strategy.lam=0"
            )

    def selective(self, round: int) -> bool:
        """Whether clients train the backbone alone."""
        return round < self.selective_rounds

    def message(self, state: State, round: Round) -> Message:
        """The whole model, since neck and head change each round at the server, and the phase."""
        shared = super().message(state, round).shared
        return Message(replace(shared, values={"selective": self.selective(round.index)}))

    def clients_round(self, server: Server, state: State, round: Round) -> State:
        """The backbone's mean move, or that of all."""
        if not self.selective(round.index):
            return super().clients_round(server, state, round)
        replies = server.exchange(self.message(state, round), self.folding({"backbone": "mean"}))
        if not len(replies):
            return state
        assert self.layout is not None
        replies.log.update(box_shares(replies.ok))
        part = self.aggregate(replies, "backbone")
        new = {"w": self.parts.put(state["w"].clone(), self.server_lr * part, self.layout)}
        if ("buffers", "mean") in replies.folded:
            found, new["buffers"] = replies.mean("buffers"), state["buffers"].clone()
            for slot in self.layout.buffers:
                if self.parts.has(slot.name):
                    new["buffers"][slot.span] = found[slot.span]
        return state | new

    def update(self, state: State, replies: Replies, round: Round) -> State:
        """Move along the mean update of everything."""
        replies.log.update(box_shares(replies.ok))
        return super().update(state, replies, round)

    def server_rule(self, job: Job) -> Callable[[Tensor, Batch], Tensor]:
        """Steps on its own loss, after the warm-up's and in the second phase with the penalty."""
        if self.selective(job.round) or not self.lam or not job.purpose.endswith("/train"):
            return super().server_rule(job)
        penalised = self.orthogonal.added(job)

        def step(w: Tensor, batch: Batch) -> Tensor:
            own, forward = job.task.parts(batch)
            return job.descend(w, batch, loss=lambda output, y: penalised(own(output, y)), forward=forward)

        return step


def box_shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the boxes of a cohort come to: ``pseudo/boxes_per_image``, those kept (score of at least lo); of them
    ``pseudo/class_share`` trained the class, and ``pseudo/place_share`` the place. Where the evaluator could tell:
    ``pseudo/precision``, the share of those kept that is right, and ``pseudo/recall``, of those that are there."""
    names = ("images", "boxes", "classed", "placed", "right", "there")
    images, boxes, classed, placed, right, there = (
        sum(o.metrics.get(f"pseudo/{n}", 0.0) for o in outcomes) for n in names
    )
    if not images:
        return {}
    shares = {"pseudo/boxes_per_image": boxes / images}
    if boxes:
        shares |= {"pseudo/class_share": classed / boxes, "pseudo/place_share": placed / boxes}
    if outcomes and all("pseudo/there" in o.metrics for o in outcomes):
        shares |= {"pseudo/precision": right / boxes} if boxes else {}
        shares |= {"pseudo/recall": right / there} if there else {}
    return shares
