"""Clients with a private linear head beside the shared model: one pass over the features, one step for everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clients.sgd import SGDClient
from fedsim.data.local import Batch
from fedsim.exchange.payload import Refusal, Update
from fedsim.local.job import Job
from fedsim.models.split import features_and_output, logits_of
from fedsim.task.evaluation import features
from fedsim.task.heads import Head, HeadSlots, check_features, with_head
from fedsim.task.layout import Layout
from fedsim.task.standalone import present
from fedsim.task.task import Task

Output = tuple[Tensor, Tensor]  # features (B, d) and logits (B, C) of the model's own head


@dataclass(frozen=True, kw_only=True)
class PrivateHeadClient(SGDClient):
    """Trains ``w`` and the private head as one vector ``(d + C (d_h + 1),)`` by SGD; sends only the first part.

    Client state: ``phi``, the private head. A subclass says what each part learns from (``shared_loss``,
    ``private_logits``) and which personal classifiers are measured (``personal``).
    """

    grad_only = False

    def setup(self, task: Task, layout: Layout) -> None:
        """Refuse a model without features and a linear head."""
        check_features(task, type(self).__name__.removesuffix("Client"))
        HeadSlots.of(layout)

    def forward(self, model: nn.Module, x: Tensor) -> Output:
        """Features and logits; here the features learn from the head, override where they must not."""
        h, output = features_and_output(model, x)
        return h, logits_of(output)

    def shared_loss(self, job: Job, h: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """The loss () of the shared model."""
        raise NotImplementedError(f"{type(self).__name__} must define shared_loss(job, h, logits, y)")

    def private_logits(self, h: Tensor, logits: Tensor, private: Head) -> Tensor:
        """What the private head is trained by; ``h`` and ``logits`` carry no gradient."""
        return private(h)

    def personal(self, job: Job, shared: Head, private: Head) -> Mapping[str, Head]:
        """Personal classifiers by name; ``""`` is the method's own."""
        raise NotImplementedError(f"{type(self).__name__} must define personal(job, shared, private)")

    def allowed(self, job: Job) -> Tensor | None:
        """Classes (C,) bool that the method's personal classifier may name; ``None``: all."""
        return None

    def private(self, job: Job) -> Tensor:
        """The private head (C (d_h + 1),): the one kept, or at first a draw of this client's own."""
        if "phi" in job.state:
            return job.state["phi"]
        return job.head.fresh(job.seed, "private head", job.client).to(job.message.arrays["w"])

    def fit(self, job: Job) -> Update:
        """Local training; one client at a time, since a step has a loss of its own."""
        return super().fit(job)

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """The extended vector."""
        return torch.cat([w, self.private(job)])

    def step(self, job: Job, w: Tensor, batch: Batch) -> Tensor:
        """One SGD step of all parts, from the features before it."""
        dim, private = job.layout.dim, list[Tensor]()
        own = w[dim:].detach().requires_grad_()

        def loss(output: Output, y: Tensor) -> Tensor:
            h, logits = output
            side = job.task.loss(self.private_logits(h.detach(), logits.detach(), job.head.of_vector(own)), y)
            private.extend(torch.autograd.grad(side, own))
            return self.shared_loss(job, h, logits, y) + side.detach()

        g = job.grad(w[:dim], batch, loss=loss, forward=self.forward)
        return job.sgd(w, torch.cat([g, *private]))

    def finish(self, job: Job, w: Tensor) -> Update:
        """Send the shared part's change, keep the private head."""
        dim = job.layout.dim
        return replace(super().finish(job, w[:dim]), state={"phi": w[dim:].clone()})

    def evaluate(self, job: Job) -> Update:
        """Measure the personal classifiers on this client's own test samples.

        Their features are looked up where the message brings ``features`` (n, d) of the whole common test set, else
        computed. ``untrained`` is 1 for a client that was never in a cohort.
        """
        if job.holdout is None or len(job.holdout) == 0:
            raise Refusal("no test samples of its own")
        w, rows = job.start(), job.holdout.index
        if "features" in job.message.arrays:
            labels = job.holdout.samples.labels
            assert labels is not None, "heads over features are refused without class labels"
            h, y = job.message.arrays["features"][rows], labels[rows.to(labels.device)]
        else:
            batch = job.holdout.everything()
            h, y = features(job.model, w, [batch])[0], batch.y
        metrics = {"untrained": float("phi" not in job.state)}
        for name, head in self.classifiers(job, w).items():
            metrics |= {f"{name}/{k}" if name else k: v for k, v in job.score(head(h), y).items()}
        return Update(metrics=metrics, weight=len(job.holdout))

    def classifiers(self, job: Job, w: Tensor) -> Mapping[str, Head]:
        """Personal classifiers over the features of ``w`` (d,), as they are measured: the method's own, ``""``, names
        none but the ``allowed`` classes."""
        heads = self.personal(job, job.head.of_model(w), job.head.of_vector(self.private(job)))
        allowed = self.allowed(job)
        return heads if allowed is None else {**heads, "": heads[""].only(allowed)}

    def own_model(self, job: Job) -> nn.Module:
        """The received features under the method's own personal classifier."""
        w = job.start()
        own = self.classifiers(job, w)[""]
        return with_head(present(job.task.model, job.model, w), job.head, own)
