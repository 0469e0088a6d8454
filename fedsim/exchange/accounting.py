"""What noise costs: epsilon of a mechanism and so many releases, by dp-accounting; and the noise that a budget buys.

Renyi divergences (Mironov 2017; subsampled: Mironov, Talwar, Zhang 2019, Wang, Balle, Kasiviswanathan 2019) of one
release are computed once by the library, added up, and converted by it (Canonne, Kamath, Steinke 2020). Privacy loss
distributions (``pld``) are tighter and take seconds. The library is an extra: ``fedsim[privacy]``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from fedsim.errors import ArgumentError, ConfigError

EVENTS = ("poisson", "truncated", "fixed", "round_robin", "plain")
FINE = 1e-4  # of the z that a budget buys: no more than this above the least
EXACT, QUICK = 1e-4, 1e-3  # steps of loss distributions: the library's own; of rows and searches
MOST = 14  # log of the z beyond which no budget is looked for
ADD_REMOVE, ZERO_OUT, REPLACE = "add_remove", "zero_out", "replace_one"


@cache
def library() -> Any:
    """dp-accounting.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401  # submodules, reached through the package
    except ImportError as e:
        raise ConfigError(
            f"privacy: epsilon is computed by dp-accounting, which is not there ({e}); "
            'type pip install "fedsim-lab[privacy]"'
        ) from e
    # of orders that its series does not converge at, and which it leaves out: the bound holds
    logging.getLogger("absl").setLevel(logging.ERROR)
    return dp_accounting


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One release of a sum with noise, and who takes part in it.

    ``event``: ``poisson``, each of n clients with probability m / n by an independent coin; ``truncated``, of those a
    random ``cap`` at most; ``fixed``, m of n without replacement; ``round_robin``, each once in ceil(n / m) releases;
    ``plain``, the same client in every release. ``sensitivity``: of all releases together, in clip bounds, where they
    are one mechanism (correlated noise): they are then accounted once, whatever their number.
    """

    event: str
    z: float
    n: int = 1
    m: int = 1
    cap: int | None = None
    sensitivity: float | None = None
    assume_poisson: bool = False  # the usual figure for fixed cohorts, which is no bound

    def __post_init__(self) -> None:
        if self.event not in EVENTS:
            raise ArgumentError(f"event={self.event!r}: choose one of {', '.join(EVENTS)}")
        if not (self.z >= 0 and 1 <= self.m <= self.n):
            raise ArgumentError(f"z={self.z}, m={self.m}, n={self.n}: expected z >= 0 and 1 <= m <= n")

    @property
    def alone(self) -> bool:
        """Whether each release is accounted by itself, whoever takes part in others."""
        return self.event == "plain" and self.sensitivity is None

    def epsilon(self, releases: int, delta: float, accountant: str = "rdp") -> tuple[float, str]:
        """Epsilon of so many releases, and the relation of data sets that it holds for."""
        accountant = "pld" if self.event == "truncated" else accountant
        if releases < 1:
            return 0.0, self.candidates(releases, accountant)[0][1]
        if self.z == 0:
            return math.inf, self.candidates(releases, accountant)[0][1]
        if self.sensitivity is not None:
            return gaussian_epsilon(self.sensitivity / self.z, delta), ZERO_OUT
        found = [
            (_epsilon(kind, z, self.n, self.m, self.cap, count, delta, accountant), relation)
            for kind, relation, z, count in self.candidates(releases, accountant)
        ]
        return min(found)

    def bound(self, releases: int, delta: float, accountant: str = "rdp") -> tuple[float, str]:
        """The same at the cost of a row: where loss distributions are all there is (``truncated``), from steps ten
        times as long, by which epsilon is no less, and more by about 1e-5 of it."""
        if self.event != "truncated" or releases < 1 or self.z == 0:
            return self.epsilon(releases, delta, accountant)
        return _truncated_epsilon(self.z, self.n, self.m, self.cap, releases, delta, QUICK), ADD_REMOVE

    def candidates(self, releases: int, accountant: str) -> list[tuple[str, str, float, int]]:
        """Events that each bound the releases: kind, relation, noise multiplier and how often."""
        if self.sensitivity is not None:
            return [("plain", ZERO_OUT, self.z / self.sensitivity, 1)]
        if self.event == "poisson" or (self.event == "fixed" and self.assume_poisson):
            return [("poisson", ADD_REMOVE, self.z, releases)]
        if self.event == "truncated":
            return [("truncated", ADD_REMOVE, self.z, releases)]
        if self.event == "round_robin":
            return [("plain", ZERO_OUT, self.z, turns(releases, self.n, self.m))]
        plain = [("plain", ZERO_OUT, self.z, releases)]
        if self.event == "fixed" and accountant == "rdp" and self.m < self.n:
            # two clipped vectors differ by twice the bound, which the library leaves to its caller
            plain.append(("fixed", REPLACE, self.z / 2, releases))
        return plain

    def noise_for(self, epsilon: float, releases: int, delta: float, accountant: str = "rdp") -> float:
        """The z that affords so many releases, no more than ``FINE`` above the least (Brent's method).

        Raises:
            ConfigError: if no noise does.
        """

        def affords(z: float) -> bool:
            return replace(self, z=z).bound(releases, delta, accountant)[0] <= epsilon

        def off(log_z: float) -> float:
            found = replace(self, z=math.exp(log_z)).bound(releases, delta, accountant)[0]
            return math.log(min(max(found, 1e-12), 1e12) / epsilon)

        low, high = -3.0, 0.0
        while off(high) > 0:
            low, high = high, high + 1
            if high > MOST:
                raise ConfigError(
                    f"privacy.epsilon={epsilon}: no noise gives that at delta {delta:g}; type more"
                )
        if off(low) <= 0:
            return math.exp(low)
        from scipy.optimize import brentq  # tens of MB that few runs need

        z = math.exp(brentq(off, low, high, xtol=FINE / 4 / math.exp(high)))
        while not affords(z):
            z += FINE / 4
        return z

    def affordable(self, epsilon: float, most: int, delta: float, accountant: str = "rdp") -> int:
        """How many releases, of at most ``most``, cost no more than ``epsilon``; by bisection."""
        if self.bound(most, delta, accountant)[0] <= epsilon:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.bound(middle, delta, accountant)[0] <= epsilon else (low, middle)
            )
        return low


def turns(releases: int, n: int, m: int) -> int:
    """How often one client takes part where all take turns: ``ceil(T m / n)``."""
    return -(-releases * m // n)


def epsilon(
    q: float, z: float, releases: int, delta: float, accountant: str = "rdp", relation: str = ADD_REMOVE
) -> float:
    """Epsilon of releases of a Gaussian sum over a Poisson sample (q = 1: over all), noise z clip bounds.

    Under ``replace_one`` two vectors differ by twice the bound; ``rdp`` is then given z / 2, ``pld`` knows it.
    """
    dp = library()
    if not 0 < q <= 1:
        raise ArgumentError(f"q={q}: must lie in (0, 1]")
    z = z / 2 if relation == REPLACE and accountant == "rdp" else z
    event = dp.GaussianDpEvent(z)
    return _composed(
        event if q == 1 else dp.PoissonSampledDpEvent(q, event), releases, delta, accountant, relation
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian release of sensitivity / noise = ``mu``, exact (Balle, Wang 2018)."""
    if not mu > 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    library()
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    loss = GaussianPrivacyLoss(1 / mu)
    if loss.get_delta_for_epsilon(0.0) <= delta:
        return 0.0
    high = 1.0
    while loss.get_delta_for_epsilon(high) > delta:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if loss.get_delta_for_epsilon(middle) <= delta else (middle, high)
    return high


def gaussian_noise(epsilon: float, delta: float) -> float:
    """z of one Gaussian release of sensitivity 1, exact: the inverse of :func:`gaussian_epsilon`."""
    high = 1.0
    while gaussian_epsilon(1 / high, delta) > epsilon:
        high *= 2
    low = 0.0
    while high - low > FINE * 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_epsilon(1 / middle, delta) <= epsilon else (middle, high)
    return high


@cache
def _divergences(kind: str, z: float, n: int, m: int) -> tuple[list[float], np.ndarray]:
    """Orders, and the Renyi divergences of one release at them."""
    dp = library()
    gaussian = dp.GaussianDpEvent(z)
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    event: Any = gaussian
    if kind == "poisson" and m < n:
        event = dp.PoissonSampledDpEvent(m / n, gaussian)
    elif kind == "fixed":
        relation = dp.NeighboringRelation.REPLACE_ONE
        event = dp.SampledWithoutReplacementDpEvent(n, m, gaussian)
    accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(event)
    return np.asarray(accountant.orders).tolist(), np.asarray(accountant.rdp)


@lru_cache(maxsize=2)
def _truncated(z: float, n: int, m: int, cap: int | None, step: float) -> Any:
    """The library's loss distribution of one release, in steps of ``step``; the shorter, the longer it takes."""
    losses = library().pld.privacy_loss_distribution
    make = losses.from_truncated_subsampled_gaussian_mechanism
    return make(n, m / n, cap, z, value_discretization_interval=step)


def _truncated_epsilon(
    z: float, n: int, m: int, cap: int | None, count: int, delta: float, step: float
) -> float:
    """As the library's accountant composes it, to the last bit."""
    none = library().pld.privacy_loss_distribution.identity(step)
    composed = none.compose(_truncated(z, n, m, cap, step).self_compose(count))
    return float(composed.get_epsilon_for_delta(delta))


def _epsilon(
    kind: str, z: float, n: int, m: int, cap: int | None, count: int, delta: float, accountant: str
) -> float:
    dp = library()
    if kind == "truncated":
        return _truncated_epsilon(z, n, m, cap, count, delta, EXACT)
    if accountant == "rdp":
        orders, one = _divergences(kind, z, n, m)
        return float(
            dp.rdp.rdp_privacy_accountant.compute_epsilon(orders, (count * one).tolist(), delta)[0]
        )  # of plain numbers: twice as fast
    if kind == "plain":
        return gaussian_epsilon(math.sqrt(count) / z, delta)
    event = dp.GaussianDpEvent(z)
    return _composed(
        event if m == n else dp.PoissonSampledDpEvent(m / n, event), count, delta, "pld", ADD_REMOVE
    )


def _composed(event: Any, count: int, delta: float, accountant: str, relation: str) -> float:
    """A whole call of the library."""
    dp = library()
    related = (
        dp.NeighboringRelation.REPLACE_ONE
        if relation == REPLACE
        else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    kinds: dict[str, Callable[..., Any]] = {"rdp": dp.rdp.RdpAccountant, "pld": dp.pld.PLDAccountant}
    if accountant not in kinds:
        raise ArgumentError(f"accountant={accountant!r}: choose one of {', '.join(kinds)}")
    made = kinds[accountant](neighboring_relation=related)
    made.compose(event, count)
    return float(made.get_epsilon(delta))
