"""What weights are pretrained on before a run: labels, or samples told apart from each other (SimCLR).

A way of pretraining is a local rule of one job that holds all samples: ``network`` gives what is trained, ``fit``
trains it with the job's optimiser and batches. Options are those of group ``pretrain``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fedsim.data.local import Batch
from fedsim.errors import ConfigError
from fedsim.local.job import Job
from fedsim.models.split import features_of, named_head


class Pretext(Protocol):
    """What any way of pretraining has."""

    def network(self, model: nn.Module, example: Any) -> nn.Module:
        """What is trained: ``model``, or a module that holds it. ``example``: two inputs."""

    def fit(self, job: Job) -> Tensor:
        """The trained vector (d,) of that network; what the last loss did not depend on counts as untrained."""


@dataclass(frozen=True)
class Supervised:
    """The run's own loss on all samples; batches as the view ``view`` shows them, if one is named."""

    view: str | None = None

    def network(self, model: nn.Module, example: Any) -> nn.Module:
        """The model itself."""
        return model

    def fit(self, job: Job) -> Tensor:
        """Plain training."""
        w = job.start()
        for batch in job.batches():
            w = job.descend(w, batch if self.view is None else job.view(self.view, batch))
        return w


@dataclass(frozen=True)
class SimCLR:
    """Chen et al. 2020, "A simple framework for contrastive learning of visual representations", Algorithm 1.

    Two draws of the view ``view`` of each sample; a projection of ``projection`` numbers (two layers over
    what goes into the model's head) is trained beside the body and thrown away. The head is not trained.
    """

    view: str = "strong"
    temperature: float = 0.5
    projection: int = 64

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.projection < 1:
            raise ConfigError(
                f"pretrain.temperature={self.temperature}, pretrain.projection={self.projection}: must be positive"
            )

    def network(self, model: nn.Module, example: Any) -> nn.Module:
        """The model's body with a projection on it."""
        if named_head(model) is None and not callable(getattr(model, "features", None)):
            raise ConfigError(
                f"pretrain: SimCLR trains model.features(x) -> (B, d), which {type(model).__name__} lacks; "
                "name the module that is its head, e.g. model.head=classifier, or type pretrain=central"
            )
        return Projected(model, example, self.projection)

    def fit(self, job: Job) -> Tensor:
        """Local steps on NT-Xent, eq. 1."""
        w = job.start()
        for batch in job.batches():
            first, second = (job.view(self.view, batch).x for _ in range(2))
            both = Batch(tree_map(lambda *pair: torch.cat(pair), first, second), batch.y)
            w = job.descend(w, both, loss=self.loss)
        return w

    def loss(self, z: Tensor, y: Any) -> Tensor:
        """NT-Xent of projections z (2N, k); targets have no part in it."""
        return nt_xent(z, self.temperature)


class Projected(nn.Module):
    """What goes into the model's head, with two layers on it: (B, ...) to (B, size)."""

    def __init__(self, model: nn.Module, example: Any, size: int) -> None:
        super().__init__()
        self.model = model
        tried = model.training
        model.eval()
        with torch.no_grad():
            dim = _features(model, example).shape[1]
        model.train(tried)
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, size))

    def forward(self, x: Any) -> Tensor:
        """Projections (B, size)."""
        out: Tensor = self.projection(_features(self.model, x))
        return out


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """The mean over all 2N rows of the normalised temperature-scaled cross entropy, eq. 1 of Chen et al. 2020.

    Rows i and N + i of ``z`` (2N, k) are two views of one sample. For such a pair (i, j) it is
    ``-log exp(s_ij / T) / sum over k != i of exp(s_ik / T)``, s the cosine.
    """
    z = F.normalize(z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (z @ z.T / temperature).masked_fill(own, float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(alike, partner)


def _features(model: nn.Module, x: Any) -> Tensor:
    return features_of(model, x).flatten(1)
