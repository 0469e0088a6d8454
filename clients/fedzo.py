"""FedZO's local half (Fang et al. 2022, arXiv 2201.09531): local SGD along gradients estimated by forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.base import Client
from clients.directions import Directions, add_scaled
from clients.slopes import Probe
from fedsim.exchange.payload import NonFinite, Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class FedZOClient(Client):
    """Local steps along ``g = (d / b) sum_j [L(x + mu v_j) - L(x)] / mu v_j``, v_j on the unit sphere, b =
    ``directions``; d trainable parameters. The steps are those of ``client``: lr, epochs or steps, optimiser."""

    grad_only = False

    weighting: str
    directions: int
    mu: float
    measure: str

    def fit(self, job: Job) -> Update:
        """H local steps; sends the model's change.

        Raises:
            NonFinite: if no slope was finite: the model did not move by what the client has.
        """
        x, z = job.anchor.clone(), None
        drawn, d, step = Directions(job.seed, "local", job.layout.params), job.layout.size, 0
        with Probe(job, x, job.message.arrays.get("buffers"), self.mu, self.measure) as probe:
            for batch in job.batches():
                probe.at(x)
                g = torch.zeros_like(x)
                for _ in range(self.directions):
                    z, step = drawn.sphere(job.round, job.client, step, x, z), step + 1
                    add_scaled(g, d / self.directions * probe.slope(batch, z), z)
                x = job.sgd(x, g)
            if probe.blind:
                raise NonFinite("the loss on either side of every direction")
        return Update({"delta": job.delta(x)}, weight=job.weight(self.weighting), metrics=probe.report())
