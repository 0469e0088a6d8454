"""Synchronous gossip against computations by hand, its options, and what it logs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    Problem,
    Quadratic,
    classes,
    classification,
    hashes,
    linear_loss,
    network,
    recorded,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import fedsim
from fedsim.errors import ConfigError
from strategies.gossip import variance_corrected_average

PEERS = ("topology=ring", "clients_per_round=6")
RING = [[5, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 0]]


def peers_of(result: fedsim.RunResult) -> dict[str, Tensor]:
    """The state that a run ended with; of models with one parameter ``x`` without padding."""
    newest = sorted((result.dir / "checkpoint").glob("round-*"))[-1]
    state = load_file(newest / "state.safetensors")
    return (
        {**state, "peers": state["peers"][:, : len(result.weights["x"])]} if "x" in result.weights else state
    )


def linear_peers(
    d: int = 4, n: int = 6, rounds: int = 3, **more: Any
) -> tuple[Problem, np.ndarray, np.ndarray]:
    """Peers with one sample (A, b) each, so that a step's gradient is ``A x - b``, and nothing is drawn."""
    rng = np.random.default_rng(0)
    a, b = np.eye(d) + 0.3 * rng.normal(size=(n, d, d)), rng.normal(size=(n, d))
    settings = (
        "dtype=float64",
        f"rounds={rounds}",
        f"clients_per_round={n}",
        "client.steps=1",
        "client.batch_size=1",
        "client.lr_decay=1",
        "client.weight_decay=0",
        "client.clip_norm=null",
        "strategy.init_models=shared",
        "strategy.scope=all",
    )
    clients = [(torch.tensor(a[i : i + 1]), torch.tensor(b[i : i + 1])) for i in range(n)]
    start = rng.normal(size=d).tolist()
    return Problem(Quadratic(d, start), clients, settings, linear_loss, **more), a, b


def reference(
    order: str, start: np.ndarray, a: np.ndarray, b: np.ndarray, rounds: int, *, momentum: float, keep: bool
) -> np.ndarray:
    """Ring gossip, own weight 1/2, lr 0.1, with the average per peer; none of it stacked."""
    n = len(a)
    x = [start.copy() for _ in range(n)]
    m = [np.zeros_like(start) for _ in range(n)]

    def mixed(models: list[np.ndarray]) -> list[np.ndarray]:
        named = [{"x": torch.tensor(v)} for v in models]
        return [
            variance_corrected_average(named[i], [named[j] for j in RING[i]], scope="all")["x"].numpy()
            for i in range(n)
        ]

    for _ in range(rounds):
        if order == "mix_then_train":
            x = mixed(x)
        change = []
        for i in range(n):
            m[i] = momentum * (m[i] if keep else 0 * m[i]) + a[i] @ x[i] - b[i]
            change.append(-0.1 * m[i])
        if order == "simultaneous":
            x = [v + c for v, c in zip(mixed(x), change, strict=True)]
        else:
            x = [v + c for v, c in zip(x, change, strict=True)]
        if order == "train_then_mix":
            x = mixed(x)
    return np.stack(x)


@pytest.mark.parametrize("order", ["train_then_mix", "mix_then_train", "simultaneous"])
@pytest.mark.parametrize(("momentum", "keep"), [(0.0, True), (0.9, True), (0.9, False)])
def test_rounds_against_a_computation_per_peer(order: str, momentum: float, keep: bool) -> None:
    problem, a, b = linear_peers()
    result = problem.run(
        "strategy=gossip",
        "topology=ring",
        f"strategy.order={order}",
        f"client.momentum={momentum}",
        f"strategy.momentum={'keep' if keep else 'reset'}",
    )
    assert isinstance(problem.model, nn.Module)
    start = problem.model.x.detach().numpy()
    expected = reference(order, start, a, b, 3, momentum=momentum, keep=keep)
    found = peers_of(result)["peers"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(result.weights["x"].numpy(), expected.mean(axis=0), rtol=1e-12)


def test_d_psgd_is_its_equation() -> None:
    """x_i <- sum_j W_ij x_j - lr grad_i(x_i) with Metropolis weights, all 1/3 on a ring (Lian et al., Algorithm 1)."""
    problem, a, b = linear_peers()
    found = peers_of(problem.run("strategy=dpsgd", "topology=ring"))["peers"].numpy()
    assert isinstance(problem.model, nn.Module)
    x = np.tile(problem.model.x.detach().numpy(), (6, 1))
    w = (np.eye(6) + np.roll(np.eye(6), 1, axis=0) + np.roll(np.eye(6), -1, axis=0)) / 3
    for _ in range(3):
        x = w @ x - 0.1 * (np.einsum("nij,nj->ni", a, x) - b)
    np.testing.assert_allclose(found, x, rtol=1e-12)


def test_peers_that_are_offline_keep_their_model_and_are_not_heard() -> None:
    problem, a, b = linear_peers(rounds=1, cohorts=[[0, 1, 3]])
    found = peers_of(problem.run("strategy=gossip", "topology=ring", "clients_per_round=3"))["peers"].numpy()
    assert isinstance(problem.model, nn.Module)
    start = problem.model.x.detach().numpy()
    trained = {i: start - 0.1 * (a[i] @ start - b[i]) for i in (0, 1, 3)}
    named = {i: {"x": torch.tensor(v)} for i, v in trained.items()}
    for i in (2, 4, 5):
        np.testing.assert_array_equal(found[i], start)
    np.testing.assert_allclose(found[3], trained[3], rtol=1e-13)  # online, but alone
    for i, j in ((0, 1), (1, 0)):
        expected = variance_corrected_average(named[i], [named[j]], scope="all")["x"].numpy()
        np.testing.assert_allclose(found[i], expected, rtol=1e-12)


def test_every_peer_starts_from_its_own_seed() -> None:
    settings = (*PEERS, "rounds=1", "client.lr=1e-12", "strategy.averaging=plain", "strategy.own_weight=1")
    own = peers_of(classification().run("strategy=gossip", *settings))["peers"]
    again = peers_of(classification().run("strategy=gossip", *settings))["peers"]
    other = peers_of(classification().run("strategy=gossip", *settings, "seed=1"))["peers"]
    assert torch.equal(own, again)
    both = torch.cat([own, other])
    assert all(not torch.equal(both[i], both[j]) for i in range(12) for j in range(i))
    built = peers_of(classification(model=network).run("strategy=gossip", *settings))["peers"]
    assert torch.allclose(built, built[:1].expand(6, -1), atol=1e-8)  # this factory ignores the generator
    shared = peers_of(classification().run("strategy=gossip", *settings, "strategy.init_models=shared"))[
        "peers"
    ]
    assert torch.allclose(shared, shared[:1].expand(6, -1), atol=1e-8)


def test_plain_averaging_loses_the_variance_and_the_correction_keeps_it() -> None:
    """32 Xavier networks on a random 8-regular graph: after 20 rounds plain averaging is at 1/32 of the start."""
    settings = [
        "experiment=gossip_digits",
        "engine=serial",
        "tracker=quiet",
        "rounds=20",
        "evaluation.every=20",
        "evaluation.target=null",
        "evaluation.stop_at_target=false",
        "data.subset=640",
        "strategy.evaluate_peers=2",
    ]
    for averaging, left in (("plain", 1 / 32), ("variance_corrected", 1.0)):
        row = fedsim.simulate([*settings, f"strategy.averaging={averaging}"]).rows[-1]
        assert row["variance/layers.0.weight"] == pytest.approx(left, rel=0.15)
        assert row["variance/layers.1.weight"] == pytest.approx(left, rel=0.25)


def test_what_is_measured() -> None:
    settings = (
        *PEERS,
        "evaluation.every=1",
        "evaluation.holdout=0.3",
        "evaluation.clients_every=1",
        "rounds=2",
    )
    strategy, result = recorded("gossip", classification(clients=classes((14,) * 6)), *settings)
    row, x = result.rows[-1], strategy.states[-1]["peers"].double()
    mean = x.mean(0)
    assert row["consensus_distance"] == pytest.approx(float((x - mean).norm(dim=1).mean()), rel=1e-6)
    each = result.per_client.query("round == 2 and metric == 'test/accuracy'").value
    assert len(each) == 6
    assert row["accuracy"] == pytest.approx(each.mean())
    assert row["accuracy_min"] == each.min() and row["accuracy_max"] == each.max()
    assert row["accuracy_std"] == pytest.approx(each.std(ddof=0))
    local = result.per_client.query("round == 2 and metric == 'evaluate/accuracy'").value
    assert row["clients/accuracy"] == pytest.approx(local.mean())
    assert row["clients/accuracy_max"] == local.max()
    first = strategy.states[-1]["start"]
    now = x[:, :20].var(dim=1, correction=0).mean()
    assert row["variance/0.weight"] == pytest.approx(float(now / first[0]), rel=1e-5)
    assert "mean_model/accuracy" in row
    facts = result.summary["topology"]
    assert (facts["graph"], facts["degree_mean"], facts["edges"]) == ("ring", 2.0, 6)


def test_messages_and_their_bytes_are_those_between_peers() -> None:
    """53 parameters in float32; with the correction 4 bytes for each of two matrices; two neighbours each."""
    for strategy, size in (("gossip", (53 - 10) * 4 + 2 * 4), ("gossip_fedavg", (53 - 10) * 4)):
        result = classification().run(f"strategy={strategy}", *PEERS)
        row = result.rows[0]
        assert row["messages"] == 12
        assert row["bytes_up"] == row["bytes_down"] == 12 * size
        table = result.per_client.query("round == 1 and metric == 'bytes_up'")
        assert set(table.value) == {2.0 * size}
    lossy = classification().run("strategy=gossip", *PEERS, "strategy.loss=0.5").rows
    assert sum(r["bytes_down"] for r in lossy) < sum(r["bytes_up"] for r in lossy)
    one = classification().run("strategy=gossip", *PEERS, "strategy.fanout=1").rows[0]
    assert one["messages"] == 6
    first = classification().run("strategy=gossip", *PEERS, "strategy.order=mix_then_train").rows[0]
    assert first["bytes_up"] == first["bytes_down"] == 12 * ((53 - 10) * 4 + 2 * 4)


def test_batch_norm_statistics_follow_the_policy() -> None:
    problem = classification("bn")
    of = {
        policy: recorded(
            "gossip", problem, *PEERS, "rounds=1", f"buffers={policy}", "strategy.init_models=shared"
        )
        for policy in ("average", "local")
    }
    strategy, _ = of["average"]
    statistics = strategy.states[0]["buffers"]
    assert not torch.equal(statistics[0], statistics[1])
    alone = recorded(
        "gossip",
        problem,
        *PEERS,
        "rounds=1",
        "buffers=average",
        "strategy.init_models=shared",
        "strategy.own_weight=1",
    )[0].states[0]["buffers"]
    mixed = torch.stack([0.5 * alone[i] + 0.25 * alone[RING[i]].sum(0) for i in range(6)])
    torch.testing.assert_close(statistics, mixed)
    strategy, _ = of["local"]
    assert torch.equal(strategy.states[0]["buffers"], strategy.states[0]["buffers"][:1].expand(6, -1))
    kept = [k["local/buffers"] for k in strategy.kept[0]]
    torch.testing.assert_close(torch.stack(kept), alone)


def test_vectorised_peers_agree_with_the_loop() -> None:
    settings = (*PEERS, "client.momentum=0.9", "client.lr_decay=0.9", "dtype=float64")
    one, many = (
        peers_of(classification().run("strategy=gossip", *settings, f"engine.vectorize={v}"))["peers"]
        for v in ("off", "on")
    )
    torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-12)


def test_the_graph_is_drawn_into_the_run_folder() -> None:
    result = classification().run("strategy=gossip", *PEERS, "tracker.plots=true")
    assert (result.dir / "topology.png").read_bytes()[:4] == b"\x89PNG"


def test_a_time_varying_graph_carries_each_round_its_own_messages() -> None:
    result = classification().run("strategy=gossip", "topology=time_varying", "clients_per_round=6")
    assert [r["messages"] for r in result.rows] == [6.0] * 4  # one peer heard each
    assert len(set(hashes(result))) == 4


def test_models_that_cannot_be_drawn_again_are_named() -> None:
    problem, _, _ = linear_peers()
    with pytest.raises(ConfigError, match=r"'x' lies in a layer without reset_parameters"):
        problem.run("strategy=gossip", "topology=ring", "strategy.init_models=independent")
    given = network().state_dict()
    with pytest.raises(ConfigError, match=r"type strategy.init_models=shared"):
        classification(initial=given).run("strategy=gossip", *PEERS)
