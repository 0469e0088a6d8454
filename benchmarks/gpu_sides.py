"""The sides of the benchmark on a GPU: the bare CUDA loop, fedsim, and the workloads."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fedsim
from benchmarks import sides
from benchmarks.workloads import WORKLOADS, Workload

WORK = {
    "M": WORKLOADS["M"],
    "L": replace(WORKLOADS["L"], clients=20),
    "R": replace(WORKLOADS["R"], clients=20, samples=500),
}
SMALL = {
    "M": replace(WORKLOADS["M"], clients=6, cohort=6),
    "L": replace(WORKLOADS["L"], clients=6, samples=120, cohort=6),
    "R": replace(WORKLOADS["R"], clients=4, cohort=4),
}


class CudaLoop:
    """Federated averaging on one GPU without a framework: data there, a flat vector, no wait before a round's end."""

    def __init__(self, work: Workload, form: str = "fresh"):
        self.work, self.form = work, form
        self.x, self.y = (t.cuda() for t in work.data())
        self.model = work.model().cuda().train()
        self.params = list(self.model.parameters())
        sizes = [p.numel() for p in self.params]
        self.w = torch.cat([p.detach().reshape(-1) for p in self.params])
        for p, part in zip(self.params, self.w.split(sizes), strict=True):
            p.data = part.view(p.shape)
        self.datas, self.server = [p.data for p in self.params], self.w.clone()
        self.g = torch.zeros_like(self.w)
        if form == "flat":
            for p, v in zip(self.params, self.g.split(sizes), strict=True):
                p.grad = v.view(p.shape)

    def step(self, rows: Tensor) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
        if self.form == "flat":
            self.g.zero_()
            loss.backward()
            self.w.add_(self.g, alpha=-self.work.lr)
        else:
            torch._foreach_add_(self.datas, torch.autograd.grad(loss, self.params), alpha=-self.work.lr)

    def round(self, cohort: Sequence[int]) -> None:
        n, total = self.work.samples, torch.zeros_like(self.w)
        for client in cohort:
            self.w.copy_(self.server)
            order = torch.randperm(n, device="cuda").add_(client * n)
            for rows in order.split(self.work.batch):
                self.step(rows)
            total.add_(self.w.sub_(self.server), alpha=n)
        self.server.add_(total, alpha=1 / (n * len(cohort)))
        torch.cuda.synchronize()


def bare_seconds(work: Workload, rounds: int, forms: Sequence[str]) -> dict[str, list[float]]:
    """Seconds a round, by form of the gradient."""
    found = {}
    for form in forms:
        loop, seconds = CudaLoop(work, form), list[float]()
        for _ in range(1 + rounds):
            cohort = torch.randperm(work.clients)[: work.cohort].tolist()
            start = time.perf_counter()
            loop.round(cohort)
            seconds.append(time.perf_counter() - start)
        found[form] = seconds[1:]
    return found


class RoundTimer:
    """Seconds of each round of a run."""

    def __init__(self, work: Workload, rounds: int):
        self.work, self.rounds, self.times = work, rounds, [time.perf_counter()]

    def round(self, row: dict[str, Any], clients: Sequence[Any]) -> None:
        self.times.append(time.perf_counter())

    def round_done(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@contextlib.contextmanager
def out() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"out={folder}"


def simulated(
    work: Workload, rounds: int, *extra: str, model: Any = None, callbacks: Sequence[Any] = ()
) -> Any:
    """FedAvg on the serial engine, on the GPU unless ``extra`` says otherwise."""
    x, y = work.data()
    n = work.samples
    with out() as folder:
        return fedsim.simulate(
            [
                "engine=serial",
                "engine.device=cuda",
                *sides.settings(work, rounds),
                folder,
                *extra,
            ],
            model=model or work.model(),
            clients=[(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)],
            callbacks=list(callbacks),
        )
