"""FedSTO's local rule: a detector trained on boxes that a moving average of it finds, first its backbone, then all of
it. Kim, Lin, Lee, Lee, Kwon: Navigating Data Heterogeneity in Federated Learning: A Semi-Supervised Federated Object
Detection, NeurIPS 2023.

Usable by themselves: ``route``, ``ema``, ``auto_alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.detector_parts import DetectorParts
from clients.orthogonal import orthogonality, starting
from clients.pseudo import UNLABELLED, Positions, outputs, refuse_accumulation
from clients.sgd import SGDClient
from fedsim.data.local import Batch, LocalData
from fedsim.data.views import Traced, Unchanged
from fedsim.exchange.payload import BoxGuesses, Refusal, Update
from fedsim.local.job import Job

KEPT = 0.86  # of the teacher after a local epoch in the paper: .999 over some 156 steps
Boxes = Mapping[str, Tensor]
PartLosses = Callable[[Any, Boxes], Mapping[str, Tensor]]


class Routes(NamedTuple):
    """What each box (...) counts for: its class and its place (bool), and what objectness is to be (0: background)."""

    classed: Tensor
    boxed: Tensor
    objectness: Tensor


def route(score: Tensor, objectness: Tensor, lo: float, hi: float, sure: float = 0.99) -> Routes:
    """Boxes (...) by ``score`` = objectness x class: the class counts from ``hi`` on, the place too or where
    ``objectness > sure``; below ``lo`` is background, from there on the teacher's ``objectness`` is the target."""
    high = score >= hi
    return Routes(high, high | (objectness > sure), torch.where(score >= lo, objectness, 0.0))


def ema(teacher: Tensor, w: Tensor, alpha: float) -> Tensor:
    """``alpha teacher + (1 - alpha) w``, in the place of ``teacher``."""
    return teacher.mul_(alpha).add_(w, alpha=1 - alpha)


def auto_alpha(steps: int) -> float:
    """The ``alpha`` of which as much of a teacher is left after ``steps`` as in the paper after a local epoch."""
    return float(KEPT ** (1 / max(steps, 1)))


class BoxTally:
    """The boxes that one job finds, over all its steps: images looked at, boxes kept, and of these those that train
    class and place; and what the evaluator needs to tell how right they are."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("images", "boxes", "classed", "placed"), 0)
        self._kept: list[BoxGuesses] = []
        self._blind = False  # not all of them can be followed

    def add(
        self, at: Tensor, target: Mapping[str, Tensor], scores: Tensor, x: Any, view: Traced | None
    ) -> None:
        """A step trains on ``target`` in the images at positions ``at``, shown as ``x`` by ``view``."""
        masks = (target["labels"] >= 0, target["classed"], target["boxed"])
        self.counts["images"] += len(at)
        for name, number in zip(
            ("boxes", "classed", "placed"), torch.stack(masks).sum((1, 2)).tolist(), strict=True
        ):
            self.counts[name] += number
        if view is None or view.moves is None or not isinstance(x, Tensor) or x.dim() != 4:
            self._blind = True
            return
        moves = torch.stack(view.moves, dim=1) if view.moves else torch.zeros(len(at), 0, 2, 3)
        size = (int(x.shape[2]), int(x.shape[3]))
        self._kept.append(
            BoxGuesses(at, target["boxes"], target["labels"], scores, moves.double(), size, view.visible)
        )

    @property
    def guesses(self) -> BoxGuesses | None:
        """All of them, padded to the same M; ``None`` where views move images in ways that cannot be followed."""
        if self._blind or not self._kept:
            return None
        kept = self._kept
        most = max(part.labels.shape[1] for part in kept)

        def whole(parts: list[Tensor], empty: float) -> Tensor:
            return torch.cat(
                [F.pad(t, (0, 0) * (t.dim() - 2) + (0, most - t.shape[1]), value=empty) for t in parts]
            )

        return BoxGuesses(
            torch.cat([part.at for part in kept]),
            whole([part.boxes for part in kept], 0),
            whole([part.labels for part in kept], -1),
            whole([part.scores for part in kept], 0),
            torch.cat([part.moves for part in kept]),
            kept[0].size,
            kept[0].visible,
        )


@dataclass(frozen=True)
class Orthogonality:
    """``lam`` times the sum of ``omega`` over matrices outside the backbone, ``exact`` or by power iteration."""

    parts: DetectorParts
    lam: float
    exact: bool = True

    def added(self, job: Job) -> Callable[[Tensor], Tensor]:
        """What makes of a batch's loss () at the present weights that with the penalty."""
        if not self.lam:
            return lambda loss: loss
        names = self.parts.matrices(job.layout)
        held = dict(job.model.module.named_parameters())
        vectors = None if self.exact else starting({n: held[n] for n in names}, job.rng("omega"))

        def whole(loss: Tensor) -> Tensor:
            return loss + self.lam * orthogonality({n: held[n] for n in names}, vectors).to(loss)

        return whole


@dataclass(frozen=True, kw_only=True)
class FedSTOClient(SGDClient):
    """Each step: the teacher finds boxes in the weak view, the model is trained on them in the strong view of that, and
    the teacher follows, ``teacher <- alpha teacher + (1 - alpha) w`` (its statistics too).

    With ``selective`` in the message the backbone alone is trained and sent (``backbone``), else everything
    (``delta``), with the penalty ``orthogonal``. ``alpha = None``: ``auto_alpha``. ``carry``: the teacher goes on from
    round to round, instead of beginning as the received model. Client state: the teacher, its own model. A client whose
    teacher finds no box in the whole round refuses.
    """

    grad_only = False

    parts: DetectorParts
    orthogonal: Orthogonality
    lo: float
    hi: float
    sure: float
    alpha: float | None
    carry: bool
    weights: Mapping[str, float]  # of the losses class, objectness and box
    decode: Callable[[Any], Boxes]
    losses_of: PartLosses
    weak: str | None
    strong: tuple[str, ...]

    def fit(self, job: Job) -> Update:
        """Local training on unlabelled images."""
        refuse_accumulation(job, "FedSTO")
        own = job.unlabelled
        if own is None or not len(own):
            raise Refusal("no unlabelled samples")
        own = LocalData(own.samples, own.index, own.dtype, own.normalize)
        selective = bool(job.values["selective"])
        w = job.start()
        teacher, statistics = self._teacher(job, w)
        if selective:
            job.sgd = job.optimiser(self.parts.patterns)
        steps = job.steps_over(own)
        alpha = auto_alpha(steps) if self.alpha is None else self.alpha
        penalised = (lambda loss: loss) if selective else self.orthogonal.added(job)
        tally = BoxTally()
        for batch in job.batches(UNLABELLED, data=Positions.of(own)):
            shown, traced = self._weakly(job, own.read(batch.y))
            target, scores = self.found(job, teacher, statistics, shown)
            tally.add(batch.y, target, scores, shown.x, traced)
            w = self._step(job, w, Batch(shown.x, target), selective, penalised)
            ema(teacher, w, alpha)
            ema(statistics, job.model.buffers, alpha)
        if not job.steps:
            raise Refusal("one sample, too few for BatchNorm")
        counts = tally.counts
        if not counts["boxes"]:
            raise Refusal(f"its teacher found no box of at least {self.lo} in {counts['images']} images")
        update = self._sent(job, w, selective, float(len(own)))
        metrics = {**update.metrics, **{f"pseudo/{k}": float(v) for k, v in counts.items()}}
        state = {"teacher": teacher} | ({"statistics": statistics} if len(statistics) else {})
        return replace(update, metrics=metrics, state=state, guesses=tally.guesses)

    def _weakly(self, job: Job, batch: Batch) -> tuple[Batch, Traced | None]:
        """A batch in the weak view, and that, if it is to be followed: where true boxes are told they go along."""
        if self.weak is None:
            return batch, None if batch.y is not None else Traced(Unchanged(), [])
        return (
            (job.view(self.weak, batch), None) if batch.y is not None else job.traced_view(self.weak, batch)
        )

    def found(
        self, job: Job, teacher: Tensor, statistics: Tensor, shown: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Boxes to train on in the images ``shown``, padded to (B, M), with what each counts for, and their scores;
        true ones where the client is told them."""
        if shown.y is not None:
            boxes = {"boxes": shown.y["boxes"], "labels": shown.y["labels"]}
            certain = (boxes["labels"] >= 0).to(boxes["boxes"].dtype)
            boxes |= {"scores": certain, "objectness": certain}
        else:
            given = self.decode(outputs(job, teacher, [shown.x], statistics)[0])
            boxes = {k: given[k].detach() for k in ("boxes", "labels", "scores", "objectness")}
        kept = (boxes["labels"] >= 0) & (boxes["scores"] >= self.lo)
        most = max(1, int((kept * torch.arange(1, kept.shape[1] + 1, device=kept.device)).max()))
        kept, boxes = kept[:, :most], {k: v[:, :most] for k, v in boxes.items()}
        routes = route(boxes["scores"], boxes["objectness"], self.lo, self.hi, self.sure)
        target = {
            "boxes": boxes["boxes"],
            "labels": boxes["labels"].masked_fill(~kept, -1),
            "objectness": routes.objectness,
            "classed": routes.classed & kept,
            "boxed": routes.boxed & kept,
        }
        return target, boxes["scores"]

    def _step(
        self, job: Job, w: Tensor, batch: Batch, selective: bool, penalised: Callable[[Tensor], Tensor]
    ) -> Tensor:
        for name in self.strong:
            batch = job.view(name, batch)

        def loss(output: Any, y: Any) -> Tensor:
            found = self.losses_of(output, y)
            return penalised(torch.stack([v * found[k].mean() for k, v in self.weights.items()]).sum())

        if not selective:
            return job.descend(w, batch, loss=loss)

        def forward(module: nn.Module, x: Any) -> Any:
            with self.parts.alone(module):
                return job.task.output(module, x)

        return job.sgd(w, job.grad(w, batch, loss=loss, forward=forward))

    def _sent(self, job: Job, w: Tensor, selective: bool, count: float) -> Update:
        """What the client has made of the model."""
        delta = job.delta(w)
        weight = count if self.weighting == "samples" else 1.0
        if selective:
            return Update({"backbone": self.parts.cut(delta, job.layout)}, weight, metrics=job.report())
        return Update({"delta": delta}, weight, metrics=job.report())

    def _teacher(self, job: Job, w: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors (d,) and (b,) that the teacher begins with, its own copies."""
        if self.carry and "teacher" in job.state:
            return job.state["teacher"].clone(), job.state.get("statistics", job.model.buffers).clone()
        return w.clone(), job.model.buffers.clone()

    def own_weights(self, job: Job) -> Tensor:
        """The client's last teacher; the received model before its first turn."""
        w = job.start()
        if "teacher" in job.state:
            job.model.buffers.copy_(job.state.get("statistics", job.model.buffers))
            w.copy_(job.state["teacher"])
        return w
