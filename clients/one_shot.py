"""Clients that hand over a trained model once, and what they may be asked for beyond it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clients.sgd import SGDClient
from fedsim.data.local import LocalData
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.rng import torch_rng

LEAST = 4  # samples of a proxy part


def parts(n: int, share: float, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of n samples for the model and, ``share`` of them but at least 4 (half, where that is less), for what
    is learned on top of the models; ascending."""
    count = min(max(LEAST, int(share * n + 0.5)), n // 2)
    order = torch.randperm(n, generator=rng)
    return order[count:].sort().values, order[:count].sort().values


@dataclass(frozen=True, kw_only=True)
class OneShotClient(SGDClient):
    """Plain local training; with ``proxy`` on all samples but that share, which is kept for an aggregator (FENS)."""

    vectorisable = True
    proxy: float = 0.0

    def counts(self, job: Job) -> Update:
        """Samples per class, (C,) float64: what class balance asks for beyond the model."""
        if not len(job.data):
            raise Refusal("no samples")
        return Update({"counts": job.class_counts.double()}, weight=len(job.data))


@dataclass(frozen=True, kw_only=True)
class ProxyClient(OneShotClient):
    """The same for ``proxy`` above 0: the model never sees the samples that are kept apart."""

    def prepare(self, job: Job) -> None:
        """Training, and measuring on training samples, leaves the proxy part out."""
        if job.purpose.rpartition("/")[2] == "fit":
            job.data = replace(job.data, index=job.data.index[self.split(job, job.data)[0]])

    def split(self, job: Job, data: LocalData) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions for the model and for the aggregator; the same in every exchange."""
        return parts(len(data), self.proxy, torch_rng(job.seed, "proxy", 0, job.client))

    def kept_apart(self, job: Job) -> LocalData:
        """The proxy part."""
        return replace(job.data, index=job.data.index[self.split(job, job.data)[1]])


def client_of(proxy: float) -> OneShotClient:
    """The client for a ``proxy`` share; the same object's content for every method, so that models are shared."""
    if not 0 <= proxy < 1:
        raise ConfigError(f"strategy.proxy={proxy}: must lie in [0, 1)")
    kind = ProxyClient if proxy else OneShotClient
    return kind(weighting="samples", proxy=proxy)
