"""DeComFL's local half (Li et al. 2024, arXiv 2405.15861): local steps along directions that all clients share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.codec import measured
from clients.directions import Directions, add_scaled, moved
from clients.replica import ReplicaClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout


@dataclass(frozen=True, kw_only=True)
class DeComFLClient(ReplicaClient):
    """K = ``local_steps`` steps on a copy, each on a batch of its own along P = ``directions`` directions:
    ``theta -= (lr / P) sum_j c[k, j] z(t, k, j)``. Sends c (K, P) and drops the moved copy.

    The copy moves by what is sent, ``decode(encode(c))``.
    """

    local_steps: int
    directions: int

    def count(self, job: Job) -> int:
        """K P."""
        return self.local_steps * self.directions

    def contribution(self, job: Job, theta: Tensor) -> Update:
        """The codes of c (K, P), row by row."""
        codec, codes, z = self.coding, self.coding.nothing(self.count(job)), None
        drawn, lr = Directions(job.seed, "shared", job.layout.params), self.rate(job.local, job.round)
        with self.probe(job, theta) as probe:
            for k, batch in enumerate(probe.batches(self.local_steps)):
                total = torch.zeros_like(theta)
                for j in range(self.directions):
                    z, at = drawn.draw(job.round, k, j, theta, z), k * self.directions + j
                    codes[at] = codec.encode(probe.slope(batch, z))
                    if c := float(codec.decode(codes[at])):
                        add_scaled(total, c, z)
                if k + 1 < self.local_steps:
                    probe.at(moved(probe.theta, total, lr / self.directions))
        return self.update_of(
            codes, state=self.kept(job, theta), metrics=probe.report(**measured(self.codec, codes))
        )

    def rounds_in(self, job: Job) -> int:
        """Of how many rounds the message holds frames."""
        log = job.values.get("log", b"")
        assert isinstance(log, bytes)
        return len(log) // self.coding.nbytes(self.count(job))

    def replay(self, job: Job, theta: Tensor, since: int) -> Tensor:
        """Round after round, as the server moved."""
        log, size = job.values.get("log", b""), self.coding.nbytes(self.count(job))
        assert isinstance(log, bytes)
        for i in range(self.rounds_in(job)):
            frame, t = log[i * size : (i + 1) * size], since + i
            theta = self.advanced(theta, frame, t, job.seed, job.layout, self.rate(job.local, t))
        return theta

    def advanced(self, theta: Tensor, frame: bytes, t: int, seed: int, layout: Layout, lr: float) -> Tensor:
        """The model after round ``t``, of the mean slopes in its ``frame``; of one that says "nothing", ``theta``."""
        count = self.local_steps * self.directions
        c = self.coding.decode(self.coding.unpack(frame, count)).reshape(self.local_steps, self.directions)
        drawn, z = Directions(seed, "shared", layout.params), None
        for k, row in enumerate(c.tolist()):
            total = torch.zeros_like(theta)
            for j, one in enumerate(row):
                if one:
                    z = drawn.draw(t, k, j, theta, z)
                    add_scaled(total, one, z)
            if any(row):
                theta = moved(theta, total, lr / self.directions)
        return theta
