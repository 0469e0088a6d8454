"""Just One Byte's local half (arXiv 2306.10015): slopes along directions of the client's own, a byte each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients.codec import CODECS, measured
from clients.directions import Directions, add_scaled, moved, nu
from clients.frames import Framing, Heard
from clients.replica import ReplicaClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout


@dataclass(frozen=True, kw_only=True)
class OneByteClient(ReplicaClient):
    """S = ``samples`` slopes a round, ``b = encode([L(theta + eps z) - L(theta - eps z)] / (2 eps))`` along
    ``z(t, m, s)``; sends the S codes.

    ``batch``: a new batch for each ``direction``, or one for the ``round``. ``weighting``: ``uniform``, or
    ``samples``: a direction weighs n_m.
    """

    samples: int
    batch: str
    weighting: str
    nu: str

    def count(self, job: Job) -> int:
        """S."""
        return self.samples

    def contribution(self, job: Job, theta: Tensor) -> Update:
        """The S codes; ``implied`` is what they come to, ``sums = n_m sum_s decode(b) z`` (d,)."""
        codec, z, steps = self.coding, None, torch.zeros_like(theta)
        directions, codes = Directions(job.seed, "own", job.layout.params), codec.nothing(self.samples)
        weight = len(job.data) if self.weighting == "samples" else 1
        with self.probe(job, theta) as probe:
            batches = probe.batches(self.samples if self.batch == "direction" else 1)
            for s in range(self.samples):
                if s == 0 or self.batch == "direction":
                    batch = next(batches)
                z = directions.draw(job.round, job.client, s, theta, z)
                codes[s] = codec.encode(probe.slope(batch, z))
                if c := float(codec.decode(codes[s])):
                    add_scaled(steps, weight * c, z)
        state, found = self.kept(job, theta), probe.report(**measured(self.codec, codes))
        return self.update_of(codes, implied={"sums": steps}, state=state, metrics=found)

    def nothing(self, job: Job) -> Update:
        """S codes that say so."""
        return replace(super().nothing(job), implied={"sums": torch.zeros_like(job.model.w)})

    def rounds_in(self, job: Job) -> int:
        """Of how many rounds the message holds frames."""
        framing, values = self.framing(job.source.num_clients), job.values
        if isinstance(full := values.get("log"), bytes):
            return len(full) // (framing.each * framing.clients)
        return framing.number(some) if isinstance(some := values.get("log_of_some"), bytes) else 0

    def replay(self, job: Job, theta: Tensor, since: int) -> Tensor:
        """Round after round, as the server moved."""
        for t, parts in enumerate(self._frames(job), since):
            theta = advanced(theta, parts, t, self, job.seed, job.layout, self.rate(job.local, t))
        return theta

    def framing(self, registered: int) -> Framing:
        """How rounds are written down."""
        return Framing(registered, self.coding.nbytes(self.samples), self.weighting == "samples")

    def _frames(self, job: Job) -> list[list[Heard]]:
        framing, values = self.framing(job.source.num_clients), job.values
        if isinstance(full := values.get("log"), bytes):
            return framing.read_full(full)
        return framing.read(some) if isinstance(some := values.get("log_of_some"), bytes) else []


def scale(parts: Sequence[Heard], samples: int, lr: float, kind: str) -> float:
    """What the sum of n_m c z is multiplied by: ``lr / nu(K)`` where all weigh 1, else ``nu`` of their mean weight."""
    K, total = samples * len(parts), samples * sum(p.weight for p in parts)
    return lr / nu(K, kind) * (K / total)


def advanced(
    theta: Tensor, parts: Sequence[Heard], t: int, rule: OneByteClient, seed: int, layout: Layout, lr: float
) -> Tensor:
    """The model after round ``t`` from that before it, of the codes alone: ``theta - (lr / nu(K)) sum c z(t, m, s)``.

    Summed as it is measured: a client's directions first, in order, then clients in order. Nothing arrived: ``theta``.
    """
    total: Tensor | None = None
    for steps in (_steps(theta, part, t, rule, seed, layout) for part in parts):
        total = steps if total is None else total.add_(steps)
    if total is None:
        return theta
    return moved(theta, total, scale(parts, rule.samples, lr, rule.nu))


def _steps(theta: Tensor, part: Heard, t: int, rule: OneByteClient, seed: int, layout: Layout) -> Tensor:
    """One client's ``n_m sum_s c z`` (d,)."""
    directions, total, z = Directions(seed, "own", layout.params), torch.zeros_like(theta), None
    for s, c in _slopes(part, rule):
        z = directions.draw(t, part.client, s, theta, z)
        add_scaled(total, part.weight * c, z)
    return total


def _slopes(part: Heard, rule: OneByteClient) -> Iterator[tuple[int, float]]:
    """Index and value of those that are not 0; ``0 z`` added changes no bit but the sign of a zero."""
    codec = CODECS[rule.codec]
    for s, c in enumerate(codec.decode(codec.unpack(part.codes, rule.samples)).tolist()):
        if c:
            yield s, c
