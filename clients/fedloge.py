"""FedLoGe's local rule: features against a fixed classifier, two heads beside them (Xiao et al. 2024, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from clients.etf import DEFAULT_STEPS, sparse_etf
from clients.heads import Output, PrivateHeadClient
from clients.realign import realign_local
from fedsim.errors import ConfigError, check_setting
from fedsim.exchange.payload import Refusal
from fedsim.local.job import Job
from fedsim.models.split import features_of, head_of
from fedsim.rng import torch_rng
from fedsim.task.heads import Head
from fedsim.task.layout import Layout
from fedsim.task.task import Task


@dataclass(frozen=True, kw_only=True)
class SparseClassifier:
    """What the fixed classifier S is made from; everybody rebuilds it from these few numbers.

    ``sparsity``, ``norm``, ``solver``, ``seed``: see ``clients.etf.sparse_etf``. ``bias``: ``none``, or ``random`` for
    a frozen U(-1/sqrt d, 1/sqrt d) as in the authors' code.
    """

    sparsity: float
    norm: float
    solver: str
    bias: str
    seed: int

    def __post_init__(self) -> None:
        if self.bias not in ("none", "random"):
            raise ConfigError(f"strategy.sse.bias={self.bias}: choose one of none, random")
        check = partial(check_setting, "strategy.sse")
        check(0 <= self.sparsity < 1, "sparsity", self.sparsity, "must be in [0, 1)")
        check(self.norm > 0, "norm", self.norm, "must be positive")
        check(
            self.solver in DEFAULT_STEPS, "solver", self.solver, f"choose one of {', '.join(DEFAULT_STEPS)}"
        )

    def head(self, num_classes: int, dim: int) -> Head:
        """S as a head, float64."""
        return _build(self, num_classes, dim)


@lru_cache(maxsize=8)
def _build(sse: SparseClassifier, num_classes: int, dim: int) -> Head:
    weight = sparse_etf(
        num_classes, dim, sparsity=sse.sparsity, norm=sse.norm, solver=sse.solver, seed=sse.seed
    )
    bias = torch.zeros(num_classes, dtype=torch.float64)
    if sse.bias == "random":
        draw = torch.rand(num_classes, generator=torch_rng(sse.seed, "etf/bias"), dtype=torch.float64)
        bias = dim**-0.5 * (2 * draw - 1)
    return Head(weight, bias)


@dataclass(frozen=True, kw_only=True)
class FedLoGeClient(PrivateHeadClient):
    """``CE(S h)`` moves the features, ``CE(psi h)`` the averaged head, ``CE(phi h)`` the private one.

    ``train=head`` leaves S out: features learn from the averaged head, as in FedAvg. ``mask``: the personal model names
    only classes of its client's ``train`` samples (or ``test`` samples, as in the authors' code).
    """

    sse: SparseClassifier
    train: str
    mask: str

    def setup(self, task: Task, layout: Layout) -> None:
        """Build S once per worker."""
        super().setup(task, layout)
        self.classifier(*_shape(task))

    def classifier(self, num_classes: int, dim: int) -> Head:
        """The fixed classifier S."""
        return self.sse.head(num_classes, dim)

    def forward(self, model: nn.Module, x: Tensor) -> Output:
        """With S, no gradient of the averaged head reaches the features."""
        if self.train == "head":
            return super().forward(model, x)
        h = features_of(model, x)
        return h, head_of(model)(h.detach())

    def begin(self, job: Job, w: Tensor) -> Tensor:
        """S in the run's type."""
        if self.train == "etf":
            s = self.classifier(*job.head.shape)
            job.keep |= {"sse": s.weight.to(w), "sse/bias": s.bias.to(w)}
        return super().begin(job, w)

    def shared_loss(self, job: Job, h: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """The features' loss and the averaged head's."""
        loss = job.task.loss(logits, y)
        if self.train == "etf":
            loss = loss + job.task.loss(Head(job.keep["sse"], job.keep["sse/bias"])(h), y)
        return loss

    def personal(self, job: Job, shared: Head, private: Head) -> Mapping[str, Head]:
        """The realigned sum (eq. 7), the private head alone, and the sum as trained."""
        realigned = Head(realign_local(private.weight, shared.weight), shared.bias)
        return {"": realigned + private, "phi": private, "phi_psi": shared + private}

    def allowed(self, job: Job) -> Tensor | None:
        """Classes that this client has."""
        if self.mask == "train":
            return job.class_counts > 0
        if job.holdout is None:
            raise Refusal("no test samples of its own, by which strategy.mask=test says what it may name")
        labels = job.holdout.samples.labels
        assert labels is not None, "FedLoGe is refused without class labels"
        own = labels[job.holdout.index.to(labels.device)]
        return torch.bincount(own, minlength=job.head.shape[0]) > 0


def _shape(task: Task) -> tuple[int, int]:
    weight: Tensor = head_of(task.model).weight
    return weight.shape[0], weight.shape[1]
