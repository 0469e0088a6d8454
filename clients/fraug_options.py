"""FRAug's settings, schedules and running class means (Chen et al. 2023; schedules as in the authors' code)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.local.kept import LocalPart
from fedsim.models.split import head_of, splits
from fedsim.task.layout import Layout

RATIOS = ("exp", "avg", "1overx")


def ratio(round: int, rounds: int = 300, gamma: float = 0.01, form: str = "exp") -> float:
    """Interpolation ratio r in [0, 1] of a round t counted from 0, T rounds in all.

    ``exp``: ``exp(gamma (t - T))``; ``avg``: 1/2; ``1overx``: ``1 - 1/(gamma t + 1)``.
    """
    if form == "exp":
        return math.exp(gamma * (round - rounds))
    return 0.5 if form == "avg" else 1 - 1 / (gamma * round + 1)


def synthetic_weight(round: int, rounds: int = 300, gamma: float = 0.01, form: str = "exp") -> float:
    """Weight lam of the synthetic loss, ``min(1/2, ratio)``: 0.050 in round 0 and 1/2 from 231 on by default."""
    return min(0.5, ratio(round, rounds, gamma, form))


def balanced_labels(draw: int, count: int, num_classes: int) -> Tensor:
    """The ``count`` labels of a running number of draws: cyclic from ``draw * count``, so that no class is missed."""
    return (draw * count % num_classes + torch.arange(count)) % num_classes


def update_prototypes(
    prototypes: Tensor, u: Tensor, y: Tensor, momentum: float = 0.3, first: Tensor | None = None
) -> Tensor:
    """Running class means (C, D) after a batch u (B, D), y (B,): ``M_c <- (1 - m) M_c + m mean(u[y == c])``.

    Classes absent from the batch stay. Those marked in ``first`` (C,) take the batch's mean itself. Fresh tensor.
    """
    members = F.one_hot(y, len(prototypes)).to(u.dtype)
    counts = members.sum(0)[:, None]
    means = members.T @ u / counts.clamp(min=1)
    share = torch.full_like(counts, momentum)
    if first is not None:
        share = share.masked_fill(first[:, None].bool(), 1.0)
    return torch.where(counts > 0, (1 - share) * prototypes + share * means, prototypes)


@dataclass(kw_only=True)
class FRAugOptions:
    """What a client needs to know; see ``conf/strategy/fraug.yaml``. ``gamma`` and ``latent_dim`` may be ``None``."""

    rounds: int  # T of the schedules
    schedule: str
    gamma: float | None
    lam: float | None
    warmup_rounds: int
    interpolate: bool
    latent: str
    latent_dim: int | None
    draws: int
    lr_generator: float
    lr_rtnet: float
    momentum: float
    reset_momentum: bool
    dist_generator: str
    dist_rtnet: str
    lam_generator: float
    lam_rtnet: float
    rtnet_loss: str
    rtnet_bn: bool
    proto_momentum: float
    proto_init: str
    unseen_classes: str
    share_generator: str
    use_generator: bool
    use_rtnet: bool

    def ratio(self, round: int) -> float:
        """r of this round; ``gamma: null`` is ``3 / rounds``, the authors' 0.01 over 300 rounds."""
        gamma = 3 / self.rounds if self.gamma is None else self.gamma
        return ratio(round, self.rounds, gamma, self.schedule)

    def weight(self, round: int) -> float:
        """lam of this round: as given, else ``min(1/2, r)``; 0 during the warm-up."""
        if round < self.warmup_rounds:
            return 0.0
        return min(0.5, self.ratio(round)) if self.lam is None else self.lam

    def shapes(self, model: nn.Module) -> tuple[int, int, int]:
        """D, L, C: sizes of the embedding and of the noise (by default D // 2), and the number of classes."""
        head = head_of(model)
        if not splits(model) or not isinstance(head, nn.Linear):
            raise ConfigError(
                "model: FRAug needs model.features, giving an embedding (B, D), and model.head, an nn.Linear; "
                f"{type(model).__name__} lacks them: type model.head=NAME, the linear layer that gives its output"
            )
        return head.in_features, self.latent_dim or max(1, head.in_features // 2), head.out_features

    def generator_part(self, layout: Layout) -> LocalPart:
        """What of the generator stays with the client: nothing, or all of BatchNorm (``no_bn``)."""
        return LocalPart.of("all_local" if self.share_generator == "no_bn" else "average", layout)
