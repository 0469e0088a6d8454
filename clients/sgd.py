"""Local SGD: K mini-batch steps from the received model (McMahan et al. 2017, ClientUpdate)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.base import Client
from fedsim.exchange.payload import Update
from fedsim.local.job import Job


@dataclass(frozen=True, kw_only=True)
class SGDClient(Client):
    """Plain local SGD; the update weighs n_i (``samples``) or 1 (``uniform``)."""

    vectorisable = grad_only = True
    weighting: str

    def finish(self, job: Job, w: Tensor) -> Update:
        """``delta = x_K - x`` with the configured weight."""
        return Update({"delta": job.delta(w)}, weight=job.weight(self.weighting), metrics=job.report())
