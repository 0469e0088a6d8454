"""Central noise: what a trusted server adds to a sum of clipped vectors, and how the clip bound follows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ArgumentError
from fedsim.exchange import normals as noise
from fedsim.exchange.correlated import next_noise, nodes
from fedsim.exchange.payload import Outcome
from fedsim.exchange.privacy import Privacy
from fedsim.exchange.release import OWN

AHEAD = 1 << 22  # of a vector's numbers, so many at most are drawn before they are needed (32 MB)


class CentralNoise:
    """Noise of std ``z C sqrt(G)`` for each of G vectors of an exchange; of correlated noise also what came before.

    ``cohort``: E, by which adaptive clipping measures its share. ``column``: of C (see ``correlated``), if it is
    banded; ``epoch``: releases after which a tree begins anew, if it is one. ``rounds``: of the run; within them, keyed
    numbers of the next one are drawn ahead.
    """

    def __init__(
        self,
        privacy: Privacy,
        seed: int,
        cohort: float,
        keyed: bool,
        column: Sequence[float] = (),
        epoch: int = 0,
        rounds: int = 0,
    ):
        self.privacy, self._seed, self._cohort, self._keyed = privacy, seed, cohort, keyed
        self._column, self._epoch, self._rounds = column, epoch, rounds
        self.bound = privacy.adaptive.start if privacy.adapts else float(privacy.clip)
        self._past: dict[str, list[Tensor]] = {}  # noise that later noise depends on, by vector
        self._beside = ThreadPoolExecutor(1)
        # what it was multiplied by already, and it, by vector, size and round
        self._ahead: dict[tuple[str, int, int], tuple[float, Future[Tensor]]] = {}

    @property
    def z(self) -> float:
        """The multiplier of the vectors' noise: more than z where the bits of adaptive clipping cost something."""
        privacy = self.privacy
        return z_delta(privacy.multiplier, self._bits) if privacy.adapts else privacy.multiplier

    @property
    def _bits(self) -> float:
        given = self.privacy.adaptive.noise
        return self._cohort / 20 if given is None else given

    def of(
        self, vector: str, size: int, bound: float, count: int, round: int, exchange: int, t: int
    ) -> Tensor:
        """Noise (size,), float64, of one of ``count`` vectors in the ``t``-th release (from 1)."""
        scale = self._scale(bound, count)
        drawn = self._ahead.pop((vector, size, round), None) if not exchange else None
        if drawn is not None and drawn[0] in (1.0, scale):
            by, fresh = drawn[0], drawn[1].result()
        else:
            by, fresh = 1.0, self._normals(vector, round, exchange)(size)
        fresh = fresh if by == scale else fresh.mul_(scale)
        if self._epoch:
            return self._of_tree(vector, fresh, (t - 1) % self._epoch + 1)
        if not self._column:
            return fresh
        past = self._past.get(vector, [])
        y = next_noise(fresh, past, self._column)
        kept = len(self._column) - 1
        self._past[vector] = [*past, y][-kept:] if kept else []
        return y

    def draw_ahead(self, vector: str, size: int, bound: float, count: int, round: int) -> None:
        """Begin the noise of ``round``, where that is of use: it is drawn while its clients work."""
        if not (self._keyed and round < self._rounds and size <= AHEAD):
            return
        by, normals = 1.0 if self.privacy.adapts else self._scale(bound, count), self._normals(vector, round)
        self._ahead = {k: v for k, v in self._ahead.items() if k[2] >= round - 1}
        self._ahead[vector, size, round] = by, self._beside.submit(lambda: normals(size).mul_(by))

    def _scale(self, bound: float, count: int) -> float:
        return self.z * bound * math.sqrt(count)

    def _normals(self, vector: str, round: int, exchange: int = 0) -> noise.Normals:
        if not self._keyed:
            return noise.secret
        again = (exchange,) if exchange else ()
        return noise.keyed(self._seed, f"{OWN}{vector}/noise", round, *again)

    def _of_tree(self, vector: str, fresh: Tensor, t: int) -> Tensor:
        """By how much the noise of the prefix grows with the tree's ``t``-th leaf; ``fresh`` is its new node's."""
        live = self._past.get(vector, []) if t > 1 else []
        before = torch.stack(live).sum(0) if live else torch.zeros_like(fresh)
        self._past[vector] = [*live[: len(nodes(t)) - 1], fresh]
        return torch.stack(self._past[vector]).sum(0) - before

    def adapt(self, fits: Sequence[float], round: int) -> None:
        """The bound of the next exchange, from noisy bits of those that fit."""
        if not self.privacy.adapts:
            return
        drawn, a = float(self._normals("bits", round)(1)) * self._bits, self.privacy.adaptive
        self.bound = adapted(self.bound, fits, drawn, self._cohort, a.rate, a.quantile)

    def spent(self, cost: tuple[float, str]) -> dict[str, Any]:
        """Entries of any round's row; ``cost``: epsilon of all releases so far, and the relation that it holds for."""
        privacy, (eps, relation) = self.privacy, cost
        return {
            "epsilon": eps,
            "delta": privacy.delta,
            "relation": relation,
            "z": privacy.multiplier,
            "epsilon_valid": not (privacy.assume_poisson or privacy.distributed),
        }

    def row(
        self, cost: tuple[float, str], fits: Sequence[float], long: int, squares: Sequence[float]
    ) -> dict[str, Any]:
        """Those of a round with a release; ``squares``: of the sum and of its noise."""
        hidden = self.privacy.distributed  # nobody knows of single clients, nor of the noise by itself
        return self.spent(cost) | {
            "C": self.bound,
            "clipped": None if hidden else 1 - sum(fits) / len(fits) if fits else 0.0,
            "reclipped": long,
            "noise_norm": None if hidden else math.sqrt(squares[1]),
            "sum_norm": math.sqrt(squares[0]),
        }

    def save(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors, for a checkpoint."""
        plain = {"bound": self.bound, "past": {name: len(past) for name, past in self._past.items()}}
        return plain, {f"/{n}/{i}": t for n, past in self._past.items() for i, t in enumerate(past)}

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Go on from what ``save`` gave."""
        self.bound = plain["bound"]
        self._past = {n: [tensors[f"/{n}/{i}"] for i in range(k)] for n, k in plain["past"].items()}


def too_few_shares(privacy: Privacy | None, outcomes: Sequence[Outcome]) -> str:
    """Why clients' shares of the noise do not suffice, if they add it and so few came."""
    came = sum(o.kind == "ok" for o in outcomes)
    if privacy is None or not privacy.distributed or privacy.least is None or came >= privacy.least:
        return ""
    return f"privacy.where=distributed: {came} clients answered, the noise is made of {privacy.least} shares"


def z_delta(z: float, sigma_b: float) -> float:
    """Multiplier of the vectors' noise that, with bits of noise ``sigma_b``, costs what ``z`` alone does:
    ``(z^-2 - (2 sigma_b)^-2)^(-1/2)``.

    Raises:
        ArgumentError: where the bits alone cost more.
    """
    if z == 0:
        return 0.0
    if z >= 2 * sigma_b:
        raise ArgumentError(
            f"noise z={z:.4g}, typed or found for privacy.epsilon, must be below twice that of the bits of adaptive "
            f"clipping ({sigma_b:g}); type privacy.adaptive.noise={z:.2g}, or ask more clients a round"
        )
    return float((z**-2 - (2 * sigma_b) ** -2) ** -0.5)


def adapted(
    bound: float, fits: Sequence[float], noise: float, expected: float, rate: float, quantile: float
) -> float:
    """``C exp(-eta (b - gamma))`` with ``b = (sum (b_i - 1/2) + noise) / E + 1/2`` (Andrew et al. 2021, Algorithm 1).

    ``fits``: 1 of each update that was no longer than C, else 0: bits of those that fit.
    """
    share = (sum(b - 0.5 for b in fits) + noise) / expected + 0.5
    return bound * math.exp(-rate * (share - quantile))
