"""What noise costs where one client is replaced by another, of mechanisms that are accounted for one left out."""

from __future__ import annotations

import math

from fedsim.exchange.accounting import REPLACE, Mechanism, epsilon, gaussian_epsilon, library, turns


def replaced(mechanism: Mechanism, releases: int, delta: float) -> float:
    """Epsilon of so many releases of sums, of which two data sets differ in all that one client is.

    Two clipped vectors differ by twice the bound: where the same client may be in every release that is exact, the
    Gaussian's of twice its sensitivity (Balle, Wang 2018); cohorts by coins go by privacy loss distributions, which
    know the relation, and cohorts of fixed size by what is less, that or the Renyi divergences of their sampling.
    """
    m, z = mechanism, mechanism.z
    if releases < 1:
        return 0.0
    if z == 0:
        return math.inf
    if m.sensitivity is not None:
        return gaussian_epsilon(2 * m.sensitivity / z, delta)
    if m.event == "poisson" or m.assume_poisson:
        return epsilon(m.m / m.n, z, releases, delta, "pld", REPLACE)
    if m.event == "truncated":
        dp = library()
        one = dp.pld.privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            m.n, m.m / m.n, m.cap, z, neighboring_relation=dp.NeighboringRelation.REPLACE_ONE
        )
        return float(one.self_compose(releases).get_epsilon_for_delta(delta))
    count = turns(releases, m.n, m.m) if m.event == "round_robin" else releases
    plain, (sampled, relation) = gaussian_epsilon(2 * math.sqrt(count) / z, delta), m.epsilon(releases, delta)
    return min(plain, sampled) if relation == REPLACE else plain
