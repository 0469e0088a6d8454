"""SCAFFOLD's local rule: control variates against client drift (Karimireddy et al. 2020, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.base import Client
from clients.fednova import accumulated
from fedsim.data.local import Batch
from fedsim.exchange.payload import Update
from fedsim.local.job import Job
from fedsim.task.layout import Layout


@dataclass(frozen=True, kw_only=True)
class ScaffoldClient(Client):
    """Steps along ``g - c_i + c``. Client state: ``c`` (d,), its control variate c_i.

    ``option`` 1: ``c_i+`` is the gradient of the client's whole loss at ``x^t`` (one more pass over its data); 2:
    ``c_i+ = c_i - c + (x^t - x_K) / (K lr)``, with the client's true K unless the message brings another. With local
    momentum K is ``accumulated``: how often a direction enters ``x_K``, so that ``c_i+`` is a mean of gradients.
    """

    vectorisable = True
    option: int
    weighting: str

    @property
    def grad_only(self) -> bool:  # type: ignore[override]
        """Option 1 takes the gradient of the whole loss, which no noise covers."""
        return self.option == 2

    @property
    def reads_gradients(self) -> str:
        """Option 2 takes the mean gradient from ``x^t - x_K``."""
        return "SCAFFOLD's option 2" if self.option == 2 else ""

    def init_state(self, layout: Layout) -> dict[str, Tensor]:
        """``c_i = 0``."""
        return {"c": torch.zeros(layout.dim)}

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The correction ``c - c_i`` of every step."""
        job.keep["c"] = job.message.arrays["c"] - job.state["c"]
        return w

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """Corrected SGD."""
        return job.sgd(w, job.grad(w, batch), correction=job.keep["c"])

    def finish(self, job: Job, w: Tensor) -> Update:
        """Send ``x_K - x^t`` and ``c_i+ - c_i``; store ``c_i+``."""
        if self.option == 1:
            change = job.full_gradient(job.anchor) - job.state["c"]
            delta = job.delta(w)
        else:
            job.sgd.demand_gradient_steps(self.reads_gradients)
            delta = job.delta(w)
            steps = job.values.get("steps", job.num_steps)
            assert isinstance(steps, int | float)
            work = accumulated(steps, job.local.momentum)
            change = delta / -(work * job.lr) - job.message.arrays["c"]
        return Update(
            {"delta": delta, "c": change},
            weight=job.weight(self.weighting),
            state={"c": job.state["c"] + change},
            metrics=job.report(),
        )
