"""Clients that keep BatchNorm statistics of their own: what one that never took part is measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.sgd import SGDClient
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class LocalNormClient(SGDClient):
    """Local SGD. Where statistics stay local and the client has none yet, one pass over its training samples gives
    them before it is measured (Andreux et al. 2020); no label is used and nothing is kept."""

    def own_weights(self, job: Job) -> Tensor:
        """The received model, with statistics of this client."""
        if job.local_part.buffers and "local/buffers" not in job.state and len(job.data) > 1:
            rows = torch.arange(len(job.data))
            job.start()
            job.model.collect_statistics(
                job.data.read(part).x for part in torch.tensor_split(rows, -(-len(rows) // 512))
            )
            job.state = {**job.state, "local/buffers": job.model.buffers.clone()}
        return super().own_weights(job)

    @property
    def personalises(self) -> bool:
        """By what stays with the client alone: statistics, or all of normalisation."""
        return False
