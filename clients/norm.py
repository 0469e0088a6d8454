"""Clients that keep BatchNorm statistics of their own: what one that never took part is measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.sgd import SGDClient
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class LocalNormClient(SGDClient):
    """Local SGD. Where statistics stay local and the client has none yet, one pass over its training samples gives
    them before it is measured (Andreux et al. 2020); no label is used and nothing is kept."""

    def evaluate(self, job: Job) -> Update:
        """Measure the received model on this client's held-out samples."""
        if job.local_part.buffers and "local/buffers" not in job.state and len(job.data) > 1:
            rows = torch.arange(len(job.data))
            job.start()
            job.model.collect_statistics(
                job.data.read(part).x for part in torch.tensor_split(rows, -(-len(rows) // 512))
            )
            job.state = {**job.state, "local/buffers": job.model.buffers.clone()}
        return super().evaluate(job)
