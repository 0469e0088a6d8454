"""Models that clients handed over once, what they are told apart by, and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.exchange.payload import Outcome
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights

MEASURED = ("train_accuracy", "own_test_accuracy")  # of a line; no part of what a model is told apart by
SAVED = tuple(f.name for f in fields(Outcome) if f.name not in ("hashes", "error", "guesses", "seconds"))


@dataclass(frozen=True)
class Upload:
    """One client's model: ``weights``, ``samples`` it was trained on, and what is told of it."""

    client: int
    weights: Weights
    samples: float
    facts: Mapping[str, Any]  # architecture, hash of the split, class counts where the simulator knows them
    architecture: int = 0  # number of the model; 0: the run's (``Context.architecture``)
    measured: Mapping[str, float | None] = field(default_factory=dict)  # ``MEASURED``; empty in older folders

    def line(self, layout: Layout) -> dict[str, Any]:
        """What it is told apart by."""
        return {
            "client": self.client,
            "sha256": self.weights.hash(layout),
            "samples": self.samples,
            **self.facts,
        }


@dataclass(frozen=True)
class Uploads:
    """All models that came, by client, and what became of every client that was asked."""

    models: Sequence[Upload]
    outcomes: Sequence[Outcome]
    lines: Sequence[Mapping[str, Any]]  # of the models, in their order
    asked: bool = (
        True  # whether this run's own settings would ask for them; not, maybe, those of a named folder
    )

    @property
    def hash(self) -> str:
        """Sha256 over the sorted lines: equal ones mean the same models of the same clients."""
        texts = sorted(json.dumps(line, sort_keys=True) for line in self.lines)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()

    @property
    def lost(self) -> list[int]:
        """Clients whose code failed, or sent no finite numbers: the next time they may do better."""
        return sorted({o.client for o in self.outcomes if o.kind in ("failed", "nonfinite")})

    @property
    def samples(self) -> Tensor:
        """n_k (K,), float64."""
        return torch.tensor([m.samples for m in self.models], dtype=torch.float64)

    @property
    def average(self) -> Weights | None:
        """FedAvg of the models, where clients train several architectures of those of the run's own."""
        return self.average_of(0)

    def average_of(self, architecture: int) -> Weights | None:
        """The mean of the models of an ``architecture``, by its number, weighted by samples (by nothing, if nobody says
        how many); ``None`` if there are none."""
        models = [m for m in self.models if m.architecture == architecture]
        if not models:
            return None
        share = torch.tensor([m.samples for m in models], dtype=torch.float64)
        share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(share))

        def mean(parts: Sequence[Tensor]) -> Tensor:
            out = torch.zeros_like(parts[0], dtype=torch.float64)
            for part, s in zip(parts, share.tolist(), strict=True):
                out.add_(part.double(), alpha=s)
            return out.to(parts[0].dtype)

        return Weights(mean([m.weights.w for m in models]), mean([m.weights.buffers for m in models]))

    def __len__(self) -> int:
        return len(self.models)


class Depot(Protocol):
    """Where a run's uploads lie, and those of other runs that asked for the same."""

    @property
    def own_tests(self) -> bool:
        """Whether clients have test samples of their own."""

    def facts(self, client: int) -> Mapping[str, Any]:
        """What the simulator knows of a client's samples."""

    def alone(self) -> AbstractContextManager[None]:
        """Inside, nobody else makes the same uploads."""

    def read(self, cohort: Sequence[int] = (), *, own: bool = False) -> Uploads | None:
        """Uploads of this run (``own``), of the folder that is named, or of any run that asked for the same of the same
        ``cohort``; ``None`` if there are none."""

    def write(self, uploads: Uploads, *, share: bool = False, found: bool = False) -> None:
        """Write them into the run's folder and, to ``share`` them, for others; or what was ``found`` there."""


def plain_outcome(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values, without what differs between computations."""
    values = {name: getattr(outcome, name) for name in SAVED}
    return values | {"values": dict(outcome.values), "metrics": dict(outcome.metrics)}
