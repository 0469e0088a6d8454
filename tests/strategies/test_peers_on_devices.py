"""Peers on simulated devices, and robust rules among neighbours, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from problems import classification, hashes
from scipy.sparse import csr_array
from test_gossip import PEERS, linear_peers, peers_of
from torch import nn

import fedsim
from strategies.aggregators import coordinate_median, krum, mean
from strategies.averaging import mix

SIZES = (7, 12, 3, 10, 6, 11)  # samples of the six peers, seen twice a round
MESSAGE = 43 * 4 + 2 * 4  # parameters, and the variances of two matrices


@pytest.fixture
def fleet(tmp_path: Path) -> tuple[str, ...]:
    """Six devices: 10 samples/s but peer 2, 1 kB/s down, 0.5 kB/s up but peer 4, 100 ms, 2 W and 1 W."""
    rows = [f"{c},{1 if c == 2 else 10},1,{0.1 if c == 4 else 0.5},100,2,1" for c in range(6)]
    text = "client,speed,down,up,latency,compute_watts,radio_watts\n" + "\n".join(rows) + "\n"
    (tmp_path / "fleet.csv").write_text(text)
    return ("system=table", f"system.devices.path={tmp_path / 'fleet.csv'}")


def seconds(peer: int, sent: int, received: int) -> tuple[float, float]:
    """Of training and of messages, of one peer of the fleet."""
    work = 2 * SIZES[peer] / (1 if peer == 2 else 10)
    up = 100 if peer == 4 else 500
    return work, 0.1 + received * MESSAGE / 1000 + 0.1 + sent * MESSAGE / up


def told(result: fedsim.RunResult, metric: str) -> dict[int, float]:
    found = result.per_client.query(f"round == 1 and metric == '{metric}'")
    return dict(zip(found.client, found.value, strict=True))


@pytest.mark.parametrize("order", ["train_then_mix", "mix_then_train", "simultaneous"])
def test_a_round_takes_the_training_and_the_messages_of_the_slowest_peer(
    fleet: tuple[str, ...], order: str
) -> None:
    result = classification().run("strategy=gossip", *PEERS, *fleet, "rounds=1", f"strategy.order={order}")
    expected = {c: seconds(c, 2, 2) for c in range(6)}
    assert told(result, "sim_seconds") == pytest.approx({c: sum(v) for c, v in expected.items()})
    assert result.rows[0]["sim_seconds"] == pytest.approx(sum(expected[2]))
    energy = sum(2 * work + links for work, links in expected.values())
    assert result.rows[0]["joules"] == pytest.approx(energy)
    without = classification().run("strategy=gossip", *PEERS, "rounds=1", f"strategy.order={order}")
    assert hashes(result) == hashes(without)


def test_the_middle_of_a_star_sends_and_receives_most(fleet: tuple[str, ...]) -> None:
    settings = ("strategy=gossip", "topology=star", "clients_per_round=6", "rounds=1")
    result = classification().run(*settings, *fleet)
    assert told(result, "sim_seconds")[0] == pytest.approx(sum(seconds(0, 5, 5)))
    assert told(result, "sim_seconds")[1] == pytest.approx(sum(seconds(1, 1, 1)))


def test_a_late_peer_neither_sends_nor_receives(fleet: tuple[str, ...]) -> None:
    """Peer 2 trains for 6 s: the others mix and pay as if it were offline."""
    settings = ("strategy=gossip", "topology=ring", "rounds=1", "strategy.init_models=shared")
    late = ("system.deadline=6", "system.stragglers=drop")
    result = classification().run(*settings, *PEERS, *fleet, *late)
    (failure,) = result.rows[0]["failures"]
    assert failure["client"] == 2 and "missed the deadline of 6 s" in failure["reason"]
    assert result.rows[0]["sim_seconds"] == 6
    alone = classification(cohorts=[[0, 1, 3, 4, 5]]).run(*settings, "clients_per_round=5")
    assert hashes(result) == hashes(alone)
    sent = {0: 2, 1: 1, 2: 0, 3: 1, 4: 2, 5: 2}
    assert told(result, "bytes_up") == {c: k * MESSAGE for c, k in sent.items()}


# -- robust rules -------------------------------------------------------------------------------------------------


def test_a_rule_sees_differences_from_the_receiver() -> None:
    """Receiver 0 hears 1, 2 and, twice, 3; receiver 1 nobody; receiver 2 keeps its model by weight."""
    g = np.random.default_rng(0)
    own, pool = g.normal(size=(3, 7)), g.normal(size=(4, 7))
    counts = csr_array(np.array([[0.0, 1, 1, 2], [0, 0, 0, 0], [1, 1, 0, 0]]))
    weights = csr_array(counts.multiply(np.array([[0.15], [0.0], [0.0]])))
    own_weights = np.array([0.4, 1.0, 1.0])
    found = own.copy()
    mix(found, pool, own_weights, weights, counts, (), rule=coordinate_median)
    heard = np.stack([pool[1], pool[2], pool[3], pool[3]])
    np.testing.assert_allclose(found[0], 0.4 * own[0] + 0.6 * np.median(heard, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(found[1:], own[1:])
    nearest = own.copy()
    mix(nearest, pool, own_weights, weights, counts, (), rule=lambda u, w: krum(u, w, f=0))
    np.testing.assert_allclose(nearest[0], 0.4 * own[0] + 0.6 * pool[3], rtol=1e-12)  # the one sent twice
    plain, averaged = own.copy(), own.copy()
    mix(plain, pool, own_weights, weights, counts, ())
    mix(averaged, pool, own_weights, weights, counts, (), rule=mean)
    np.testing.assert_allclose(averaged, plain, rtol=1e-12)


def test_a_run_under_a_robust_rule_is_its_equation() -> None:
    problem, a, b = linear_peers()
    settings = ("strategy.averaging=plain", "aggregator=coordinate_median", "topology=complete")
    found = peers_of(problem.run("strategy=gossip", *settings))["peers"].numpy()
    assert isinstance(problem.model, nn.Module)
    x = np.tile(problem.model.x.detach().numpy(), (6, 1))
    for _ in range(3):
        x = x - 0.1 * (np.einsum("nij,nj->ni", a, x) - b)
        x = np.stack([0.5 * x[i] + 0.5 * np.median(np.delete(x, i, axis=0), axis=0) for i in range(6)])
    np.testing.assert_allclose(found, x, rtol=1e-10)


@pytest.mark.parametrize("strategy", [("gossip",), ("gossip_async", "strategy.ticks_per_round=12")])
def test_hostile_neighbours_are_outvoted(strategy: tuple[str, ...]) -> None:
    """Two of six send noise of size 1000: it reaches the honest in a mean, not in a median."""

    def honest(*overrides: str) -> float:
        result = classification().run(
            f"strategy={strategy[0]}",
            *strategy[1:],
            "topology=complete",
            "clients_per_round=6",
            "rounds=2",
            "client.epochs=1",
            "attack=random_gaussian",
            "attack.fraction=0.34",
            "attack.scale=1000",
            *overrides,
        )
        return float(peers_of(result)["peers"].abs().amax(dim=1).median())

    assert honest("strategy.averaging=plain") > 50
    for averaging in ("strategy.averaging=plain", "strategy.target=self"):
        assert honest(averaging, "aggregator=coordinate_median") < 5
