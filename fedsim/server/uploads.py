"""Models that clients hand over once: asked for, written down with hashes, and found again.

A method that works on them in many ways compares those on the same models: what was asked for under the same settings,
code and samples is not asked for again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.exchange.payload import Outcome, Replies
from fedsim.task.layout import Layout
from fedsim.task.vectors import Weights

if TYPE_CHECKING:
    from fedsim.exchange.payload import Message
    from fedsim.server.exchanges import Server

TOLD = tuple(f.name for f in fields(Outcome) if f.name not in ("hashes", "error", "guesses", "seconds"))


@dataclass(frozen=True)
class Upload:
    """One client's model: ``weights``, ``samples`` it was trained on, and what is told of it."""

    client: int
    weights: Weights
    samples: float
    facts: Mapping[str, Any]  # architecture, hash of the split, class counts where the simulator knows them

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

    @property
    def hash(self) -> str:
        """Sha256 over the sorted lines: equal ones mean the same models of the same clients."""
        texts = sorted(json.dumps(line, sort_keys=True) for line in self.lines)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()

    @property
    def samples(self) -> Tensor:
        """n_k (K,), float64."""
        return torch.tensor([m.samples for m in self.models], dtype=torch.float64)

    @property
    def average(self) -> Weights:
        """FedAvg of the models: their mean, weighted by samples (by nothing, if nobody says how many)."""
        share = self.samples
        share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(share))

        def mean(parts: Sequence[Tensor]) -> Tensor:
            out = torch.zeros_like(parts[0], dtype=torch.float64)
            for part, s in zip(parts, share.tolist(), strict=True):
                out.add_(part.double(), alpha=s)
            return out.to(parts[0].dtype)

        return Weights(
            mean([m.weights.w for m in self.models]), mean([m.weights.buffers for m in self.models])
        )

    def __len__(self) -> int:
        return len(self.models)


class Depot(Protocol):
    """Where a run's uploads lie, and those of other runs that asked for the same."""

    def facts(self, client: int) -> Mapping[str, Any]:
        """What the simulator knows of a client's samples."""

    def alone(self) -> AbstractContextManager[None]:
        """Inside, nobody else makes the same uploads."""

    def read(self, layout: Layout, *, own: bool = False) -> Uploads | None:
        """Uploads of this run (``own``), or of any that asked for the same; ``None`` if there are none."""

    def write(self, uploads: Uploads, layout: Layout, *, share: bool) -> None:
        """Write them into the run's folder and, to ``share`` them, for others."""


def gathered(server: Server, message: Message) -> Uploads | None:
    """The models of the round's cohort: found, or asked for in one exchange and written; ``None`` if nobody answered.

    ``message`` holds the model ``w`` (and ``buffers``) that clients start from. Where devices are simulated, or clients
    are real, everybody is asked in every run. What was found is in the round's log as if it had been asked for.
    """
    depot, layout = server.depot, server.layout
    shared = server.clock is None and not server.remote
    if depot is None or not shared:
        return _asked(server, message, share=False)
    with depot.alone():
        found = depot.read(layout)
        if found is None:
            return _asked(server, message, share=True)
    depot.write(found, layout, share=False)
    server.record.begins.append(len(server.record.outcomes))
    server.record.outcomes.extend(replace(o) for o in found.outcomes)
    server.facts["uploads_hash"] = found.hash
    return found


def recalled(server: Server, expected: str) -> Uploads:
    """This run's uploads, whose hash its state holds.

    Raises:
        CheckpointError: if they are gone, or others.
    """
    found = None if server.depot is None else server.depot.read(server.layout, own=True)
    if found is None or found.hash != expected:
        what = "are missing" if found is None else f"are others (uploads_hash {found.hash[:8]})"
        raise CheckpointError(
            f"uploads: the models that this run began with (uploads_hash {expected[:8]}) {what}; put its folder "
            "uploads/ back, or give resume=never to start afresh"
        )
    server.facts["uploads_hash"] = found.hash
    return found


def _asked(server: Server, message: Message, share: bool) -> Uploads | None:
    fold = {"delta": "stack"} | ({"buffers": "stack"} if "buffers" in message.shared.arrays else {})
    turns = dict.fromkeys(server.round.cohort, 0) if server.round.index else None
    before = len(server.outcomes)
    replies = server.exchange(message, fold, turns=turns)
    if not len(replies):
        return None
    found = _uploads(server, message, replies, server.outcomes[before:])
    if server.depot is not None:
        server.depot.write(found, server.layout, share=share)
    server.facts["uploads_hash"] = found.hash
    return found


def _uploads(server: Server, message: Message, replies: Replies, outcomes: Sequence[Outcome]) -> Uploads:
    arrays, deltas = message.shared.arrays, replies.stack("delta")
    none = torch.zeros(0, dtype=deltas.dtype)
    buffers = replies.stack("buffers") if "buffers" in arrays else [none] * len(deltas)
    facts = (lambda client: {}) if server.depot is None else server.depot.facts
    models = [
        Upload(c, Weights(arrays["w"] + delta, own.clone()), weight, facts(c))
        for c, delta, own, weight in zip(
            replies.clients, deltas, buffers, replies.weights.tolist(), strict=True
        )
    ]
    return Uploads(models, list(outcomes), [m.line(server.layout) for m in models])


def told(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values, without what differs between computations."""
    values = {name: getattr(outcome, name) for name in TOLD}
    return values | {"values": dict(outcome.values), "metrics": dict(outcome.metrics)}
