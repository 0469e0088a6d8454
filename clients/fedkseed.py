"""FedKSeed's local half (Qin et al. 2023, arXiv 2312.06353): local steps along a fixed pool of directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.codec import Codes, SlopeCodec, measured
from clients.directions import Directions, add_scaled, moved
from clients.replica import CURRENT, ReplicaClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.rng import numpy_rng
from fedsim.task.layout import Layout

LARGEST_POOL = 1 << 16  # an index travels as two bytes


@dataclass(frozen=True, kw_only=True)
class FedKSeedClient(ReplicaClient):
    """tau = ``local_steps`` steps ``theta -= lr c z_k`` on a copy, each on a mini-batch of its own, along a direction k
    drawn from the ``pool``; sends (k, c) of every step, or where there are more steps than directions the sum of each
    direction. The model follows from the server's sums G: ``theta_0 - lr sum_k G_k z_k``."""

    local_steps: int
    pool: int

    def count(self, job: Job) -> int:
        """Entries, ``min(tau, pool)``."""
        return entries(self.local_steps, self.pool)

    def replica(self, job: Job) -> Tensor | None:
        """Today's model, rebuilt of ``G`` where it is not at hand."""
        values, arrays = job.values, job.message.arrays
        if "w" not in arrays:
            return None
        theta, sums = arrays["w"], values.get("G")
        if CURRENT not in values and isinstance(sums, bytes):
            theta = rebuilt(theta, np.frombuffer(sums, "<f4"), job.seed, job.layout, self.lr)
        return theta if self.agrees(job, theta) else None

    def contribution(self, job: Job, theta: Tensor) -> Update:
        """Indices (n,), two bytes each, then codes (n,)."""
        drawn, z = Directions(job.seed, "pool", job.layout.params), None
        chosen, codes = self._chosen(job), self.coding.nothing(self.local_steps)
        with self.probe(job, theta) as probe:
            for i, batch in enumerate(probe.batches(self.local_steps)):
                z = drawn.draw(0, 0, int(chosen[i]), theta, z)
                codes[i] = self.coding.encode(probe.slope(batch, z))
                total = torch.zeros_like(theta)
                add_scaled(total, float(self.coding.decode(codes[i])), z)
                probe.at(moved(probe.theta, total, self.lr))
        found = probe.report(**measured(self.codec, codes))
        if self.local_steps > self.pool:
            sums = np.bincount(chosen, self.coding.decode(codes), self.pool)
            chosen, codes = np.arange(self.pool), self.coding.encode(sums)
        packed = packed_entries(chosen, codes, self.coding)
        return Update(values={"slopes": packed}, weighs=False, metrics=found)

    def nothing(self, job: Job) -> Update:
        """Entries that say that there is nothing."""
        n = self.count(job)
        packed = packed_entries(np.zeros(n, np.int64), self.coding.nothing(n), self.coding)
        return Update(values={"slopes": packed}, weighs=False)

    def _chosen(self, job: Job) -> NDArray[np.int64]:
        """The direction of each step: uniform, or by the probabilities of the message."""
        draws, p = numpy_rng(job.seed, "fit/pool", job.round, job.client), None
        if isinstance(given := job.values.get("p"), bytes):
            p = np.frombuffer(given, "<f4").astype(np.float64)
            p /= p.sum()
        return draws.choice(self.pool, self.local_steps, p=p)


def entries(local_steps: int, pool: int) -> int:
    """What a client sends a round."""
    return min(local_steps, pool)


def packed_entries(chosen: NDArray[np.int64], codes: Codes, codec: SlopeCodec) -> bytes:
    """Indices (n,) and codes (n,) as one object of bytes."""
    return chosen.astype("<u2").tobytes() + codec.pack(codes)


def read_entries(data: bytes, count: int, codec: SlopeCodec) -> tuple[NDArray[np.int64], Codes]:
    """The inverse of ``packed_entries``."""
    return np.frombuffer(data[: 2 * count], "<u2").astype(np.int64), codec.unpack(data[2 * count :], count)


def rebuilt(theta_0: Tensor, G: NDArray[np.float32], seed: int, layout: Layout, lr: float) -> Tensor:
    """``theta_0 - lr sum_k G_k z_k`` (d,), summed over k in order; directions that were never used are not drawn."""
    drawn, total, z = Directions(seed, "pool", layout.params), torch.zeros_like(theta_0), None
    for k in np.flatnonzero(G).tolist():
        z = drawn.draw(0, 0, k, theta_0, z)
        add_scaled(total, float(G[k]), z)
    return moved(theta_0, total, lr)
