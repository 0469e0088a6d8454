"""The bare loop: federated averaging without a framework, as the yardstick of ``overhead``.

One process per core, one torch thread each; a model whose parameters are views of one flat vector; batches by indexing
preloaded tensors; weighted deltas summed in place; global vector and sums in shared memory. Processes take the next
client from a shared counter, so none idles. Default allocator. Run alone it prints its own speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.workloads import WORKLOADS, Workload

FORMS = ("flat", "fresh")


class Local:
    """One process's model: ``w`` (d,) with the parameters as views of it."""

    def __init__(self, work: Workload):
        self.work = work
        self.model = work.model().train()
        self.params = list(self.model.parameters())
        sizes = [p.numel() for p in self.params]
        self.w = torch.cat([p.detach().reshape(-1) for p in self.params])
        for p, part in zip(self.params, self.w.split(sizes), strict=True):
            p.data = part.view(p.shape)
        self.datas = [p.data for p in self.params]
        self.g = torch.zeros_like(self.w)
        self.views = [v.view(p.shape) for v, p in zip(self.g.split(sizes), self.params, strict=True)]
        self.form = ""

    def use(self, form: str) -> None:
        """``flat``: a zeroed flat gradient buffer and one axpy. ``fresh``: new gradients and a foreach update."""
        self.form = form
        for p, v in zip(self.params, self.views, strict=True):
            p.grad = v if form == "flat" else None

    def step(self, x: Tensor, y: Tensor) -> None:
        """One SGD step in place."""
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.form == "flat":
            self.g.zero_()
            loss.backward()
            self.w.add_(self.g, alpha=-self.work.lr)
        else:
            grads = torch.autograd.grad(loss, self.params)
            torch._foreach_add_(self.datas, grads, alpha=-self.work.lr)

    def fit(self, x: Tensor, y: Tensor, client: int, received: Tensor, total: Tensor) -> float:
        """Train one client and add its weighted delta to ``total``; returns the weight."""
        n, batch = self.work.samples, self.work.batch
        self.w.copy_(received)
        order = torch.randperm(n).add_(client * n)
        for rows in order.split(batch):
            self.step(x[rows], y[rows])
        total.add_(self.w.sub_(received), alpha=n)
        return float(n)

    def calibrate(self, x: Tensor, y: Tensor) -> str:
        """The faster gradient form for this model on this machine."""
        seconds = {f: [] for f in FORMS}
        rows = torch.arange(self.work.batch)
        for _ in range(7):
            for form in FORMS:
                self.use(form)
                start = time.perf_counter()
                for _ in range(3):
                    self.step(x[rows], y[rows])
                seconds[form].append(time.perf_counter() - start)
        return min(FORMS, key=lambda f: statistics.median(seconds[f]))


def _process(
    conn: Connection, work: Workload, x: Tensor, y: Tensor, w: Tensor, total: Tensor, taken: Any
) -> None:
    torch.set_num_threads(1)
    local = Local(work)
    conn.send(local.calibrate(x, y))
    local.use(conn.recv())
    while (cohort := conn.recv()) is not None:
        total.zero_()
        weight = 0.0
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(cohort):
                break
            weight += local.fit(x, y, cohort[i], w, total)
        conn.send(weight)


class Bare:
    """The loop's server side; start it before anything that changes the environment of child processes."""

    def __init__(self, work: Workload, processes: int, form: str | None = None):
        self.work = work
        x, y = work.data()
        local = Local(work)
        self.w = local.w.clone().share_memory_()
        self.totals = [torch.zeros_like(self.w).share_memory_() for _ in range(processes)]
        x.share_memory_(), y.share_memory_()
        context = mp.get_context("spawn")
        self.taken = context.Value("q", 0)
        self.conns, self.processes = [], []
        saved = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith(("MALLOC_", "OMP_", "MKL_"))}
        os.environ["OMP_NUM_THREADS"] = "1"
        for total in self.totals:
            here, there = context.Pipe()
            p = context.Process(
                target=_process, args=(there, work, x, y, self.w, total, self.taken), daemon=True
            )
            p.start()
            there.close()
            self.conns.append(here)
            self.processes.append(p)
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update(saved)
        wishes = [c.recv() for c in self.conns]
        self.form = form or wishes[0]
        for c in self.conns:
            c.send(self.form)

    @property
    def pids(self) -> list[int]:
        """Of the worker processes."""
        return [p.pid for p in self.processes]

    def cpu(self) -> float:
        """CPU seconds so far, this process included."""
        times = [psutil.Process(p).cpu_times() for p in (*self.pids, os.getpid())]
        return sum(t.user + t.system for t in times)

    def round(self, cohort: Sequence[int]) -> None:
        """One round of federated averaging over ``cohort``."""
        self.taken.value = 0
        for c in self.conns:
            c.send(list(cohort))
        weight = sum(c.recv() for c in self.conns)
        for total in self.totals:
            self.w.add_(total, alpha=1 / weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The current global model."""
        model = self.work.model()
        nn.utils.vector_to_parameters(self.w.clone(), model.parameters())
        return model.state_dict()

    def close(self) -> None:
        """End the processes."""
        for c in self.conns:
            with contextlib.suppress(OSError):
                c.send(None)
        for p in self.processes:
            p.join(5)
            if p.is_alive():
                p.kill()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default="M,L,R")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--form", choices=FORMS, help="gradient form; default: the faster one, measured")
    args = parser.parse_args()
    for name in args.workloads.split(","):
        work = WORKLOADS[name]
        with Bare(work, args.processes, args.form) as bare:
            seconds = []
            for _ in range(args.rounds + 2):
                cohort = torch.randperm(work.clients)[: work.cohort].tolist()
                start = time.perf_counter()
                bare.round(cohort)
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds[2:])
            print(
                f"{name}  {args.processes} processes, gradient form {bare.form}: {median:.3f} s a round "
                f"({min(seconds[2:]):.3f}-{max(seconds[2:]):.3f}), {work.cohort / median:.1f} clients/s, "
                f"loss {work.loss(bare.state_dict()):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
