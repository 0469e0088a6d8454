"""Attackers that see what the honest clients of the round send, and agree on an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.attacks.base import Attack, check


@dataclass(frozen=True, kw_only=True)
class Colluding(Attack):
    """Base: ``collude`` gives all attackers' updates; the local half stays honest."""

    omniscient: ClassVar[bool] = True

    def wrap(self, client: Any, attackers: frozenset[int]) -> Any:
        """The client as it is: what it sends is replaced once all updates are there."""
        return client

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """What is sent (a, D) instead of ``own`` (a, D); ``honest`` is (h, D), a and h at least 1."""
        raise NotImplementedError(f"{type(self).__name__} must define collude(own, honest)")


@dataclass(frozen=True, kw_only=True)
class ALIE(Colluding):
    """``mu - z sigma``, with the honest updates' mean and deviation (divisor h - 1) per coordinate.

    Baruch, Baruch, Goldberg: A Little Is Enough, NeurIPS 2019. By default z is the largest with which the attackers,
    joined by s honest updates on their side of it, have a majority: ``Phi(z) = (n - f - s) / (n - f)``,
    ``s = floor(n / 2 + 1) - f``.
    """

    z: float | None

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """The same for all attackers."""
        z = alie_z(len(own) + len(honest), len(own)) if self.z is None else self.z
        sigma = honest.std(0) if len(honest) > 1 else torch.zeros_like(honest[0])
        return (honest.mean(0) - z * sigma).expand_as(own)


@dataclass(frozen=True, kw_only=True)
class IPM(Colluding):
    """``-epsilon mu`` with the mean of the honest updates.

    Xie, Koyejo, Gupta: Fall of Empires, UAI 2019. Small ``epsilon`` (0.1) hides among the honest, one above 1 turns
    the mean around.
    """

    epsilon: float

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """The same for all attackers."""
        return (-self.epsilon * honest.mean(0)).expand_as(own)


@dataclass(frozen=True, kw_only=True)
class Mimic(Colluding):
    """All attackers send what one honest client sends, which then counts too much.

    Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022. ``victim``:
    ``first``, the honest client of the lowest id, the same one while all take part; ``extreme``, the one farthest out
    along the round's direction of greatest variance (theirs is chosen so once, after a warm-up).
    """

    victim: str

    def __post_init__(self) -> None:
        check(self.victim in ("first", "extreme"), "victim", self.victim, "choose one of first, extreme")

    def collude(self, own: Tensor, honest: Tensor) -> Tensor:
        """Copies of the victim's update."""
        return honest[0 if self.victim == "first" else _extreme(honest)].expand_as(own)


def alie_z(n: int, f: int) -> float:
    """ALIE's z for n clients of which f attack; probabilities are kept within 0.01 and 0.99, for tiny cohorts."""
    s = math.floor(n / 2 + 1) - f
    return NormalDist().inv_cdf(min(max((n - f - s) / (n - f), 0.01), 0.99))


def _extreme(rows: Tensor) -> int:
    """The row (h, D) with the largest share in the first principal direction."""
    centred = rows.double() - rows.double().mean(0)
    _, vectors = torch.linalg.eigh(centred @ centred.T)  # its entries are the projections, up to one factor
    return int(vectors[:, -1].abs().argmax())
