"""Epsilon by dp-accounting: the printed table, the events of cohorts, the noise that a budget buys."""

from __future__ import annotations

import math

import numpy as np
import pytest
from problems import GOLDEN
from scipy.stats import norm

from fedsim.exchange.accounting import Mechanism, epsilon, gaussian_epsilon, gaussian_noise, turns
from fedsim.exchange.correlated import levels
from fedsim.exchange.replacing import replaced
from fedsim.exchange.spending import cost

TABLE = [  # q, z, T, delta, RDP, PLD
    (1, 1, 1, 1e-5, 4.7285, 4.37718),
    (1, 4, 100, 1e-5, 14.1322, 13.20671),
    (1, 20, 1000, 1e-6, 8.8469, 8.30623),
    (0.01, 1, 1000, 1e-5, 2.1014, 1.82824),
    (0.01, 0.8, 2000, 1e-5, 4.8611, 4.29344),
    (0.05, 1, 100, 1e-5, 4.0389, 3.50215),
    (0.05, 1.5, 500, 1e-6, 4.6304, 4.28025),
    (0.1, 1, 100, 1e-5, 7.9039, 7.04660),
    (0.1, 2, 200, 1e-5, 3.6798, 3.35966),
    (0.2, 1, 50, 1e-3, 8.3118, 7.06577),
    (0.2, 2, 50, 1e-3, 2.7355, 2.35547),
    (0.25, 3, 300, 1e-4, 6.8510, 6.21471),
    (0.5, 5, 100, 1e-5, 4.8664, 4.48784),
    (0.001, 0.7, 10000, 1e-7, 2.9158, 2.10208),
]


def divergence(q: float, z: float, order: int) -> float:
    """Renyi divergence of whole order of the subsampled Gaussian (Mironov, Talwar, Zhang 2019, eq. 5)."""
    k = np.arange(order + 1)
    logs = [math.lgamma(order + 1) - math.lgamma(i + 1) - math.lgamma(order - i + 1) for i in k]
    terms = np.array(logs) + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * z * z)
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize(("q", "z", "t", "delta", "rdp", "pld"), TABLE)
def test_the_printed_table(q: float, z: float, t: int, delta: float, rdp: float, pld: float) -> None:
    assert epsilon(q, z, t, delta) == pytest.approx(rdp, abs=6e-5)  # printed digits
    if q == 1:
        assert gaussian_epsilon(math.sqrt(t) / z, delta) == pytest.approx(pld, abs=5e-6)


@pytest.mark.parametrize(
    ("q", "z", "t", "delta", "rdp", "pld"),
    [pytest.param(*row, marks=() if i in (5, 10) else pytest.mark.nightly) for i, row in enumerate(TABLE)],
)
def test_the_table_by_loss_distributions(
    q: float, z: float, t: int, delta: float, rdp: float, pld: float
) -> None:
    assert epsilon(q, z, t, delta, "pld") == pytest.approx(pld, abs=5e-5 if t < 10000 else 1e-2)


def test_rounds_are_composed_as_the_library_does() -> None:
    """One release's divergences, added up and converted, are the library's own composition; and near our own."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    made = Mechanism(event="poisson", z=1.3, n=50, m=10)
    for releases in (1, 7, 90):
        whole = RdpAccountant()
        whole.compose(PoissonSampledDpEvent(0.2, GaussianDpEvent(1.3)), releases)
        assert made.epsilon(releases, 1e-4)[0] == pytest.approx(whole.get_epsilon(1e-4), rel=1e-9)
    best = min(
        90 * divergence(0.2, 1.3, a) + math.log1p(-1 / a) - math.log(1e-4 * a) / (a - 1) for a in range(2, 64)
    )
    assert made.epsilon(90, 1e-4)[0] == pytest.approx(best, rel=0.02) and made.epsilon(90, 1e-4)[0] <= best


def test_capped_cohorts_are_accounted_as_the_library_does() -> None:
    """And by rows a little above that."""
    from dp_accounting import TruncatedSubsampledGaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    made, whole = Mechanism(event="truncated", z=4.0, n=10, m=3, cap=4), PLDAccountant()
    whole.compose(TruncatedSubsampledGaussianDpEvent(10, 0.3, 4, 4.0), 20)
    exact = whole.get_epsilon(1e-2)
    assert made.epsilon(20, 1e-2)[0] == pytest.approx(exact, rel=1e-12)
    assert exact <= made.bound(20, 1e-2)[0] <= exact * (1 + 1e-4)
    most = made.bound(20, 1e-2)[0]
    assert made.affordable(most, 50, 1e-2) == 20
    assert 4 <= made.noise_for(most, 20, 1e-2) <= 4 + 2e-4


def test_cohorts_of_each_kind() -> None:
    """N 1000, m 100, z 1, 100 rounds, delta 1e-5."""

    def of(event: str, **more: object) -> Mechanism:
        return Mechanism(event=event, z=1.0, n=1000, m=100, **more)  # type: ignore[arg-type]

    assert of("poisson").epsilon(100, 1e-5) == (pytest.approx(7.9039, abs=5e-5), "add_remove")
    assert of("fixed").epsilon(100, 1e-5) == (pytest.approx(83.94, abs=5e-3), "replace_one")
    assert of("fixed", assume_poisson=True).epsilon(100, 1e-5)[0] == pytest.approx(7.9039, abs=5e-5)
    assert of("fixed").epsilon(100, 1e-5, "pld") == (pytest.approx(91.8, abs=0.05), "zero_out")
    assert of("round_robin").epsilon(100, 1e-5, "pld")[0] == pytest.approx(17.9, abs=0.05)
    assert of("plain").epsilon(100, 1e-5)[0] == of("round_robin").epsilon(1000, 1e-5)[0]
    assert turns(7, 10, 4) == 3 and of("plain").epsilon(0, 1e-5)[0] == 0.0
    assert math.isinf(Mechanism(event="poisson", z=0.0, n=10, m=2).epsilon(1, 1e-5)[0])


def test_one_client_replaced_costs_more_than_one_left_out() -> None:
    """The same; coins against the hockey-stick divergence of two mixtures, by quadrature, in one release."""
    for event, expected in (
        ("poisson", 10.516),
        ("fixed", 83.937),
        ("plain", 284.39),
        ("round_robin", 46.211),
    ):
        made = Mechanism(event=event, z=1.0, n=1000, m=100)
        assert replaced(made, 100, 1e-5) == pytest.approx(expected, rel=1e-4)
    q, z = 0.3, 1.1
    eps = replaced(Mechanism(event="poisson", z=z, n=10, m=3), 1, 1e-3)
    x = np.linspace(-20, 20, 400_001)
    here, there = ((1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, at, z) for at in (1, -1))
    delta = np.maximum(here - math.exp(eps) * there, 0).sum() * (x[1] - x[0])
    assert delta == pytest.approx(1e-3, rel=1e-4)
    coins, all_of_them = (Mechanism(event="poisson", z=1.3, n=5, m=m) for m in (2, 5))
    exact = gaussian_epsilon(2 * math.sqrt(7) / 1.3, 1e-4)
    assert (
        replaced(all_of_them, 7, 1e-4) == pytest.approx(exact, rel=1e-6) and replaced(coins, 7, 1e-4) < exact
    )
    capped = Mechanism(event="truncated", z=4.0, n=10, m=3, cap=4)
    assert (
        capped.epsilon(20, 1e-2)[0]
        < replaced(capped, 20, 1e-2)
        < gaussian_epsilon(2 * math.sqrt(20) / 4, 1e-2)
    )
    tree = Mechanism(event="plain", z=4.0, sensitivity=math.sqrt(levels(64)))
    assert replaced(tree, 64, 1e-5) == gaussian_epsilon(2 * math.sqrt(levels(64)) / 4, 1e-5)
    assert replaced(coins, 0, 1e-4) == 0 and math.isinf(replaced(Mechanism(event="plain", z=0.0), 1, 1e-4))


def test_correlated_noise_is_one_release() -> None:
    tree = Mechanism(event="plain", z=4.0, sensitivity=math.sqrt(levels(64)))
    assert tree.epsilon(1, 1e-5) == tree.epsilon(64, 1e-5) == (pytest.approx(2.729, abs=5e-4), "zero_out")


def test_golden_noise_for_a_budget() -> None:
    with np.load(GOLDEN / "release/epsilon.npz") as file:
        rows = file["calibrated"]
    for most, q, t, delta, z in rows[:4]:
        n = 1000
        found = Mechanism(event="poisson", z=1.0, n=n, m=round(q * n)).noise_for(most, int(t), delta)
        assert z * 0.96 < found <= z + 1e-4  # of whole orders; the library knows more
        assert epsilon(q, found, int(t), delta) <= most
    made = Mechanism(event="poisson", z=2.0, n=10, m=2)
    last = made.affordable(2.0, 200, 1e-3)
    assert made.epsilon(last, 1e-3)[0] <= 2.0 < made.epsilon(last + 1, 1e-3)[0]


@pytest.mark.parametrize(("most", "z"), [(1, 3.731), (4, 1.081), (8, 0.600)])
def test_exact_noise_of_one_release(most: float, z: float) -> None:
    assert gaussian_noise(most, 1e-5) == pytest.approx(z, abs=5e-4)


def test_local_noise_is_told_for_another_vector() -> None:
    """Two clipped vectors differ by up to 2 C."""
    assert cost("local", 2.0, 9, (1, 1), 1e-5) == gaussian_epsilon(3.0, 1e-5)
    assert cost("record", 1.0, 100, (10, 100), 1e-5) == pytest.approx(7.9039, abs=5e-5)
