"""DeComFL, MeZO, FedKSeed, FedZO and exact slopes: rounds rebuilt in NumPy, what they have in common, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slopes_by_hand as hand
import torch
from problems import Problem, classes, hashes
from torch import nn
from torch.nn import functional as F

COHORTS = [[0, 1, 2], [0, 2], [0, 1, 2]]  # client 1 is absent in the second round
DECOMFL = ("strategy=decomfl", "strategy.lr=0.05", "strategy.local_steps=2", "strategy.directions=3")


@pytest.mark.parametrize("codec", ["float32", "log8"])
def test_decomfl_is_its_equations_and_bytes(codec: str) -> None:
    p, K, P = hand.problem(COHORTS), 2, 3
    result = p.run(*DECOMFL, f"strategy.codec={codec}", "strategy.replicas=each", "strategy.hash_every=0")
    code, theta = (hand.single, hand.byte)[codec == "log8"], hand.start(p)
    for t, cohort in enumerate(COHORTS):
        c = np.zeros((len(cohort), K, P))
        for i, m in enumerate(cohort):
            own = theta
            for k in range(K):
                z = [hand.z("shared", t, k, j) for j in range(P)]
                c[i, k] = [code(hand.slope(own, one, p.clients[m])) for one in z]
                own = own - 0.05 / P * c[i, k] @ z
        for k in range(K):
            z = [hand.z("shared", t, k, j) for j in range(P)]
            theta = theta - 0.05 / P * np.array([code(v) for v in c.mean(0)[k]]) @ z
    np.testing.assert_allclose(hand.flat(result.weights), theta, rtol=0, atol=1e-8)
    size = K * P * (4 if codec == "float32" else 1)
    assert [r["bytes_up"] for r in result.rows] == [3 * size, 2 * size, 3 * size]
    assert [r["bytes_down"] for r in result.rows] == [0, 2 * size, 2 * size + 2 * size]


def test_one_client_one_direction_is_mezo_under_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same z: all scopes are made one here."""
    monkeypatch.setattr("clients.directions.key", lambda seed, purpose: 77)
    p = hand.problem([[0]] * 3, (15,))
    alike = ("strategy.lr=0.05", "strategy.codec=float32")
    one = p.run("strategy=one_byte", *alike, "strategy.samples=1")
    shared = p.run("strategy=decomfl", *alike, "strategy.directions=1")
    seeds = p.run("strategy=fedkseed", *alike, "strategy.local_steps=1", "strategy.pool=1", "rounds=1")
    mezo = Problem(p.model, p.clients, ("rounds=3", "clients_per_round=1", *hand.SETTINGS))
    mezo = mezo.run("strategy=mezo", *alike)
    assert hashes(one) == hashes(shared) == hashes(mezo)
    assert seeds.rows[0]["weights_hash"] == hashes(one)[0]  # pool of one: z(0, 0, 0)


def test_clients_that_are_alike_are_one_client_on_shared_directions() -> None:
    def run(count: int) -> list[str]:
        clients = classes((8,)) * count
        settings = ("rounds=3", f"clients_per_round={count}", *hand.SETTINGS)
        return hashes(Problem(hand.problem([[0]]).model, clients, settings).run(*DECOMFL))

    assert run(1) == run(4)


SEEDS = ("strategy=fedkseed", "strategy.lr=0.02", "strategy.pool=6", "strategy.local_steps=4")


@pytest.mark.parametrize("method", [(*DECOMFL, "client.lr_decay=0.7"), SEEDS], ids=["decomfl", "fedkseed"])
def test_copies_of_who_was_away_are_the_servers_bit_for_bit(method: tuple[str, ...]) -> None:
    """Whatever the rate was; every round the copies are compared. Client 3 joins late, 1 skips two rounds."""
    cohorts = [[0, 1], [0, 2], [0, 2], [0, 1, 3], [1, 2, 3]]
    p = hand.problem(cohorts, (5, 6, 4, 8))
    one, each = (p.run(*method, "strategy.hash_every=1", f"strategy.replicas={r}") for r in ("one", "each"))
    assert hashes(one) == hashes(each) and len(set(hashes(one))) == 5
    assert not any("out_of_sync" in row for row in each.rows)


def test_a_rule_over_shared_slopes_ignores_a_client_that_lies_elsewhere() -> None:
    clients = classes((8,)) * 4
    clients.append((clients[0][0] * 50, 2 - clients[0][1]))
    problem = Problem(hand.problem([[0]]).model, clients, ("rounds=2", "clients_per_round=5", *hand.SETTINGS))
    honest = Problem(problem.model, clients[:1], ("rounds=2", "clients_per_round=1", *hand.SETTINGS))
    ruled = problem.run(*DECOMFL, "aggregator=coordinate_median")
    assert hashes(ruled) == hashes(honest.run(*DECOMFL)) != hashes(problem.run(*DECOMFL))


@pytest.mark.parametrize("tau", [4, 9])
def test_fedkseed_adds_up_the_clients_steps(tau: int) -> None:
    """theta rebuilt from G is theta_0 and the weighted sum of all local steps; with more steps than directions too."""
    p, pool, lr = hand.problem(COHORTS), 6, 0.02
    settings = (
        f"strategy.lr={lr}",
        f"strategy.pool={pool}",
        f"strategy.local_steps={tau}",
        "strategy.hash_every=0",
    )
    result = p.run("strategy=fedkseed", *settings, "strategy.replicas=each")
    from fedsim.rng import numpy_rng

    z, theta = [hand.z("pool", 0, 0, k) for k in range(pool)], hand.start(p)
    for t, cohort in enumerate(COHORTS):
        n, total = [len(p.clients[m][1]) for m in cohort], np.zeros(hand.P)
        for m, weight in zip(cohort, n, strict=True):
            chosen, own = numpy_rng(0, "fit/pool", t, m).choice(pool, tau), theta
            for k in chosen:
                own = own - lr * hand.single(hand.slope(own, z[k], p.clients[m])) * z[k]
            total += weight / sum(n) * (own - theta)
        theta = theta + total
    np.testing.assert_allclose(hand.flat(result.weights), theta, rtol=0, atol=1e-7)
    up, down = 6 * min(tau, pool), 4 * pool
    assert [r["bytes_up"] for r in result.rows] == [3 * up, 2 * up, 3 * up]
    assert [r["bytes_down"] for r in result.rows] == [3 * down, 2 * down, 3 * down]
    assert hashes(result) == hashes(p.run("strategy=fedkseed", *settings))


def test_fedkseed_pro_sends_probabilities_and_draws_by_them() -> None:
    p = hand.problem(COHORTS)
    base = ("strategy=fedkseed", "strategy.lr=0.02", "strategy.pool=6", "strategy.local_steps=4")
    plain, pro = p.run(*base), p.run(*base, "strategy.pro=true")
    assert [b["bytes_down"] - 24 * len(b["cohort"]) for b in pro.rows] == [
        a["bytes_down"] for a in plain.rows
    ]
    assert hashes(pro)[-1] != hashes(plain)[-1]


def test_fedzo_is_sgd_on_estimated_gradients() -> None:
    p, b, mu = hand.problem([[0, 1]], (5, 6)), 3, 1e-4
    settings = ("client.lr=0.1", f"strategy.directions={b}", f"strategy.mu={mu}", "client.epochs=2")
    result, theta = p.run("strategy=fedzo", *settings), hand.start(p)
    ends = []
    for m in (0, 1):
        own = theta
        for step in range(2):
            g = np.zeros(hand.P)
            for j in range(b):
                v = hand.z("local", 0, m, step * b + j)
                v = v / np.linalg.norm(v)
                g += (hand.loss(own + mu * v, p.clients[m]) - hand.loss(own, p.clients[m])) / mu * v
            own = own - 0.1 * hand.P / b * g
        ends.append(own)
    expected = (5 * ends[0] + 6 * ends[1]) / 11
    np.testing.assert_allclose(hand.flat(result.weights), expected, rtol=0, atol=1e-7)
    assert result.rows[0]["bytes_up"] == 2 * (8 * hand.P + 8)


class Attention(nn.Module):
    """One head of attention over four numbers as tokens, by torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(1, 6), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x[..., None]).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


@pytest.mark.parametrize("model", [lambda: nn.Linear(4, 3), Attention])
def test_exact_slopes_agree_with_differences(model: Any) -> None:
    settings = (
        "rounds=2",
        "clients_per_round=2",
        *hand.SETTINGS,
        "strategy.codec=float32",
        "strategy.eps=1e-5",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = Problem(model(), classes((5, 6)), settings)
    ends = {
        m: p.run("strategy=one_byte", "strategy.lr=0.05", f"strategy.measure={m}").weights
        for m in ("jvp", "central", "forward")
    }
    for name, exact in ends["jvp"].items():
        torch.testing.assert_close(ends["central"][name], exact, rtol=0, atol=1e-7)
        torch.testing.assert_close(ends["forward"][name], exact, rtol=0, atol=1e-4)
