"""Clients that hand over a trained model once, and what they may be asked for beyond it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from clients.fens import aggregator, vector_of, with_vector
from clients.sgd import SGDClient
from fedsim.data.local import LocalData
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.rng import torch_rng
from fedsim.task.problems import logits_of

OUTPUTS = "z"  # what a client keeps of all models
LEAST, BATCH = 4, 512  # samples of a proxy part; that models look at together


def parts(n: int, share: float, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of n samples for the model and, ``share`` of them but at least 4 (half, where that is less), for what
    is learned on top of the models; ascending."""
    count = min(max(LEAST, int(share * n + 0.5)), n // 2)
    order = torch.randperm(n, generator=rng)
    return order[count:].sort().values, order[:count].sort().values


@dataclass(frozen=True, kw_only=True)
class OneShotClient(SGDClient):
    """Plain local training; with ``proxy`` on all samples but that share, which is kept for an aggregator (FENS)."""

    grad_only = False
    vectorisable = True
    proxy: float = 0.0

    def counts(self, job: Job) -> Update:
        """Samples per class, (C,) float64: what class balance asks for beyond the model."""
        if not len(job.data):
            raise Refusal("no samples")
        return Update({"counts": job.class_counts.double()}, weight=len(job.data))

    def apart(self, job: Job) -> LocalData:
        """The samples that an aggregator of models learns from: all, unless some were kept apart."""
        return job.data

    def outputs(self, job: Job) -> Update:
        """Logits ``z`` (n, K, C) of all models on the proxy part, kept here; nothing is sent. Where there are models of
        several architectures, those of one at a time: ``z/1``, ``z/2``, ... beside ``z``."""
        data = self.apart(job)
        if not len(data):
            raise Refusal("no samples for the aggregator")
        stack, out = job.message.arrays["models"], []
        buffers = job.message.arrays.get("model_buffers")
        for k, w in enumerate(stack):
            own = job.model.load(w, None if buffers is None else buffers[k])
            with job.model.measuring(own) as again:
                found = []
                for rows in torch.split(torch.arange(len(data)), BATCH):
                    again()
                    found.append(logits_of(job.task.output(job.model.module, data.read(rows).x)))
                out.append(torch.cat(found))
        job.meter.forward(len(data) * len(stack))
        number = int(job.values.get("architecture", 0))  # type: ignore[arg-type]
        held = {f"{OUTPUTS}/{number}" if number else OUTPUTS: torch.stack(out, dim=1).contiguous()}
        return Update(state={**job.state, **held}, weight=len(data))

    def aggregate(self, job: Job) -> Update:
        """``steps`` full-batch steps of the aggregator, the message's ``w``; sends how far it went."""
        held = sorted((k for k in job.state if k.partition("/")[0] == OUTPUTS), key=_number)
        if not held:
            raise Refusal("has no outputs of the models")
        data = self.apart(job)
        each = [job.state[k].transpose(0, 1) for k in held]
        z, y = each[0] if len(each) == 1 else torch.cat(each), data.everything().y
        start, kind = job.message.arrays["w"], str(job.values["kind"])
        module = with_vector(aggregator(kind, len(z), z.shape[2], 0, z.dtype).to(z.device), start)
        loss = torch.zeros(())
        steps, lr = int(job.values["steps"]), float(job.values["lr"])  # type: ignore[arg-type]
        for _ in range(steps):
            loss = F.cross_entropy(module(z), y)
            grads = torch.autograd.grad(loss, list(module.parameters()))
            with torch.no_grad():
                for p, g in zip(module.parameters(), grads, strict=True):
                    p.sub_(g, alpha=lr)
            job.meter.backward(len(y))
        moved = vector_of(module) - start
        return Update({"delta": moved}, weight=len(y), metrics={"aggregator_loss": float(loss.detach())})


@dataclass(frozen=True, kw_only=True)
class ProxyClient(OneShotClient):
    """The same for ``proxy`` above 0: the model never sees the samples that are kept apart."""

    def prepare(self, job: Job) -> None:
        """Training, and measuring on training samples, leaves the proxy part out."""
        if job.purpose.rpartition("/")[2] == "fit":
            job.data = self._trained(job, job.data)
        elif job.purpose.startswith("train/") and job.holdout is not None:
            job.holdout = self._trained(job, job.holdout)

    def _trained(self, job: Job, data: LocalData) -> LocalData:
        return replace(data, index=data.index[self.split(job, data)[0]])

    def split(self, job: Job, data: LocalData) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions for the model and for the aggregator; the same in every exchange."""
        return parts(len(data), self.proxy, torch_rng(job.seed, "proxy", 0, job.client))

    def apart(self, job: Job) -> LocalData:
        """The proxy part."""
        return replace(job.data, index=job.data.index[self.split(job, job.data)[1]])


def _number(name: str) -> int:
    """Of the architecture whose outputs a client keeps under ``name``."""
    return int(name.partition("/")[2] or 0)


def client_of(proxy: float) -> OneShotClient:
    """The client for a ``proxy`` share; the same object's content for every method, so that models are shared."""
    if not 0 <= proxy < 1:
        raise ConfigError(f"strategy.proxy={proxy}: must lie in [0, 1)")
    kind = ProxyClient if proxy else OneShotClient
    return kind(weighting="samples", proxy=float(proxy))
