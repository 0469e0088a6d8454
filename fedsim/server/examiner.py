"""Models measured on the common test set, by all workers together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.longtail import class_groups
from fedsim.data.views.geometry import moved
from fedsim.errors import StrategyError
from fedsim.exchange.payload import BoxGuesses, Outcome, Payload
from fedsim.models.boxes import right_ones
from fedsim.server.context import Context
from fedsim.task.evaluation import class_accuracy, mean_of, measured, over_domains
from fedsim.task.matching import matched_accuracy, open_world
from fedsim.task.metrics import confusion_of
from fedsim.task.vectors import Weights

if TYPE_CHECKING:
    from fedsim.engine.base import Engine

GROUPS = 4  # parts per worker that the test set is dealt into


@dataclass(kw_only=True)
class Examiner:
    """Deals the test set, or another in its place, out to an engine's workers and puts together what they find."""

    context: Context
    engine: Engine
    test_size: int = 0  # samples of the common test set
    test_labels: Tensor | None = (
        None  # their targets, in the order of ``FederatedData.test_rows``, if one tensor
    )
    test_domains: Mapping[str, slice] = field(default_factory=dict)  # where each domain's test samples lie
    eval_batch: int = 512
    on: str = ""  # ``val``: the validation set takes the test set's place
    truth: Callable[[int], Tensor] | None = None  # targets of a client's unlabelled samples
    kinds: Mapping[str, np.ndarray] | None = None  # of classes (C,), see ``kinds_of_classes``
    _features: tuple[Tensor, Tensor] | None = None  # a vector, and the features computed with it

    def evaluate(self, weights: Weights) -> dict[str, Any]:
        """Loss and metrics of ``weights`` on the common test set; the same for any number of workers.

        With domains also those of each domain, their mean and their spread (see ``over_domains``).
        """
        return self._summary(self._over_test("evaluate", weights)) if self.test_size else {}

    def features(self, weights: Weights) -> Tensor:
        """``model.features`` (n, d) of the whole common test set; computed once a round for the same vector."""
        if self._features is None or self._features[0] is not weights.w:
            self._features = weights.w, torch.cat(list(self._over_test("features", weights)))
        return self._features[1]

    def logits(self, weights: Weights, architecture: int = 0) -> Tensor:
        """Logits (n, C) of the whole common test set; of a model of another ``architecture``, by its number."""
        return torch.cat(list(self._over_test("logits", weights, architecture)))

    def score(self, logits: Tensor) -> dict[str, Any]:
        """What ``evaluate`` gives, of ``logits`` (n, C) of the whole common test set."""
        assert self.test_labels is not None, "methods that have features need class labels"
        labels = self.test_labels
        return self._summary(
            [measured(self.context.task, logits[a:b], labels[a:b]) for a, b, _ in self._test_batches()]
        )

    def pseudo_labels(self, client: int, guesses: Tensor) -> dict[str, float]:
        """Of guesses (n,) for the unlabelled samples of ``client``, in their order; negative where there is none.

        ``kept``, the share that has one; of these ``accuracy`` (NaN if there are none) and ``most_frequent``, the share
        of the class that is guessed most, by which a collapse is seen.

        Raises:
            StrategyError: if the run has no such samples, or not as many.
        """
        truth = None if self.truth is None else self.truth(client)
        if truth is None or truth.shape != guesses.shape:
            have = "none" if truth is None else f"labels of shape {tuple(truth.shape)}"
            raise StrategyError(
                f"pseudo labels of shape {tuple(guesses.shape)} for client {client}: its unlabelled samples have {have}"
            )
        guesses = guesses.cpu()
        kept = guesses >= 0
        n = int(kept.sum())
        right, counts = int((guesses[kept] == truth[kept]).sum()), torch.bincount(guesses[kept].long())
        return {
            "kept": n / max(len(guesses), 1),
            "accuracy": right / n if n else math.nan,
            "most_frequent": int(counts.max()) / n if n else math.nan,
        }

    def grade(self, outcome: Outcome) -> None:
        """Count how many of the pseudo labels that a client gave in its training are right (``pseudo/right``, among its
        metrics; of boxes also how many there were to find, ``pseudo/there``), and forget them."""
        guesses, outcome.guesses = outcome.guesses, None
        truth = None if self.truth is None else self.truth(outcome.client)
        if isinstance(guesses, BoxGuesses):
            found = boxes_found(guesses, truth) if isinstance(truth, Mapping) else {}
        elif guesses is not None and isinstance(truth, Tensor):
            at, classes = guesses.cpu()
            found = {"right": int((truth[at] == classes).sum())}
        else:
            return
        outcome.metrics = {**outcome.metrics, **{f"pseudo/{k}": float(v) for k, v in found.items()}}

    def pseudo_clusters(self, clients: Sequence[int], guesses: Tensor) -> dict[str, float]:
        """``pseudo/accuracy`` of guesses (n,) for all unlabelled samples of ``clients``, one client after the other:
        ids are matched to classes first, since those that nobody labelled have no names."""
        assert self.truth is not None
        truth = torch.cat([self.truth(client) for client in clients])
        if truth.shape != guesses.shape:
            raise StrategyError(f"pseudo labels of shape {tuple(guesses.shape)} for {len(truth)} samples")
        size = int(max(truth.max(), guesses.max())) + 1
        counts = confusion_of(truth, guesses.cpu(), size)
        return {"pseudo/accuracy": matched_accuracy(counts.numpy())}

    def _test_batches(self) -> list[tuple[int, int, str]]:
        """The test set in batches ``[start, stop)`` that do not mix domains, with the domain's name."""
        spans = self.test_domains or {"": slice(0, self.test_size)}
        out = list[tuple[int, int, str]]()
        for name, span in spans.items():
            edges = [*range(span.start, span.stop, self.eval_batch), span.stop]
            out += [(a, b, name) for a, b in itertools.pairwise(edges)]
        return out

    def _over_test(self, method: str, weights: Weights, architecture: int = 0) -> list[Any]:
        rows = [(a, b) for a, b, _ in self._test_batches()]
        parts = max(1, min(len(rows), GROUPS * self.engine.workers))
        groups = [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]
        values = ({"on": self.on} if self.on else {}) | (
            {"architecture": architecture} if architecture else {}
        )
        payload = Payload(weights._asdict(), values)
        return [found for part in self.engine.map(method, payload, groups) for found in part]

    def _summary(self, sums: Sequence[dict[str, Any]]) -> dict[str, Any]:
        task, counts = self.context.task, self.context.class_counts
        owners = [name for _, _, name in self._test_batches()]
        each = {
            name: mean_of([s for s, owner in zip(sums, owners, strict=True) if owner == name], task=task)
            for name in self.test_domains
        }
        more: dict[str, Any] = over_domains(each)
        if self.kinds is not None and task.confusion:
            confusion = torch.stack([part["taken_for"] for part in sums]).sum(dim=0)
            more = open_world(confusion.numpy(), self.kinds) | more
        if not task.by_class or counts is None:
            return mean_of(sums, task=task) | more
        return {**mean_of(sums, class_groups(counts), task), **class_accuracy(sums), **more}


def boxes_found(guesses: BoxGuesses, truth: Mapping[str, Any]) -> dict[str, int]:
    """How many boxes of a client's guesses are ``right`` (its class, IoU of at least .5), and how many true ones were
    ``there``, of its ``truth`` ``{"boxes": (N, M, 4), "labels": (N, M)}``, which is moved as the images were."""
    at, boxes, labels, scores, moves = (t.cpu() for t in guesses[:5])
    there = {k: truth[k][at] for k in ("boxes", "labels")}
    for back in moves.unbind(1):
        there = moved(there, back, guesses.size, guesses.visible)
    right = right_ones(boxes, labels, scores, there["boxes"], there["labels"])
    return {"right": int(right.sum()), "there": int((there["labels"] >= 0).sum())}
