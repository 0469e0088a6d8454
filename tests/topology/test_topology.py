"""Graphs, mixing weights and messages: against what is known of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import csr_array

from fedsim import topology
from fedsim.config.compose import compose
from fedsim.errors import ConfigError
from fedsim.run import participants
from fedsim.topology.facts import facts, spectral_gap
from fedsim.topology.graph_picture import draw_topology
from fedsim.topology.links import arrivals
from fedsim.topology.mixing import mixing


def dense(t: topology.Topology, at: int = 0) -> np.ndarray:
    return t.at(at).toarray()


@pytest.mark.parametrize(
    ("graph", "degrees", "edges"),
    [
        (topology.ring(6), {2}, 6),
        (topology.torus(32, rows=None), {4}, 64),
        (topology.torus(12, rows=3), {4}, 24),
        (topology.complete(5), {4}, 10),
        (topology.star(5), {1, 4}, 4),
        (topology.random_regular(32, 0, degree=8, connected="retry"), {8}, 128),
        (topology.ring(1), {0}, 0),
        (topology.ring(2), {1}, 1),
    ],
)
def test_graphs_have_the_degrees_of_their_name(
    graph: topology.Topology, degrees: set[int], edges: int
) -> None:
    assert set(graph.degrees().tolist()) == degrees
    assert np.array_equal(dense(graph), dense(graph).T) and not dense(graph).diagonal().any()
    assert dense(graph).sum() == 2 * edges


def test_random_graphs_depend_on_the_seed_alone() -> None:
    make = {
        "regular": lambda s: topology.random_regular(20, s, degree=4, connected="retry"),
        "erdos": lambda s: topology.erdos_renyi(20, s, p=0.3, connected="retry"),
        "scale-free": lambda s: topology.barabasi_albert(20, s, m=3, connected="retry"),
        "small world": lambda s: topology.watts_strogatz(20, s, k=4, p=0.5, connected="retry"),
    }
    for name, draw in make.items():
        assert np.array_equal(dense(draw(3)), dense(draw(3))), name
        assert not np.array_equal(dense(draw(3)), dense(draw(4))), name
    assert dense(make["scale-free"](0)).sum() == 2 * 3 * 17
    assert dense(make["small world"](0)).sum() == 2 * 20 * 2


def test_a_graph_in_parts_is_redrawn_refused_or_allowed(tmp_path: Path) -> None:
    sparse = topology.erdos_renyi(12, 0, p=0.25, connected="retry")
    assert nx.is_connected(sparse.graph())
    with pytest.raises(ConfigError, match=r"100 draws were, the last in 12 separate parts.*connected=allow"):
        topology.erdos_renyi(12, 0, p=0.0, connected="retry")
    assert dense(topology.erdos_renyi(12, 0, p=0.0, connected="allow")).sum() == 0
    path = tmp_path / "edges.txt"
    path.write_text("0 1\n2 3\n")
    with pytest.raises(ConfigError, match="it is in 2 separate parts"):
        topology.edge_list(4, path=str(path), directed=False, connected="retry")


def test_an_edge_list_is_read_with_comments_and_direction(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("# two arcs\n0 1\n1, 2  # a comma will do\n\n1 1\n0 1\n")
    arcs = topology.edge_list(3, path=str(path), directed=True, connected="retry")
    assert arcs.directed and dense(arcs).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]  # rows receive
    both = topology.edge_list(3, path=str(path), directed=False, connected="retry")
    assert dense(both).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    for text, message in (
        ("0 x", "line 1: '0 x' is no edge"),
        ("0 1\n0 9", "line 2: edge 0 9, but peers are 0 to 2"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            topology.edge_list(3, path=str(path), directed=False, connected="allow")
    with pytest.raises(ConfigError, match="no such file"):
        topology.edge_list(3, path=None, directed=False, connected="allow")


def test_a_time_varying_graph_is_a_function_of_time() -> None:
    hops = topology.time_varying(8, 0, graph=topology.exponential)
    for t, step in enumerate((1, 2, 4, 1)):
        expected = np.zeros((8, 8))
        expected[(np.arange(8) + step) % 8, np.arange(8)] = 1
        assert np.array_equal(dense(hops, t), expected)
    with pytest.raises(ConfigError, match="gave int at t=0"):
        topology.time_varying(8, 0, graph=lambda t, n, s: 3)
    with pytest.raises(ConfigError, match="node 8 is no peer"):
        topology.time_varying(8, 0, graph=lambda t, n, s: nx.path_graph(9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topology.random_regular(5, 0, degree=3, connected="retry"), "topology.degree=3"),
        (lambda: topology.random_regular(4, 0, degree=4, connected="retry"), "topology.degree=4"),
        (lambda: topology.torus(12, rows=5), "topology.rows=5: does not divide num_clients=12; try 3"),
        (lambda: topology.erdos_renyi(4, 0, p=1.5, connected="retry"), "topology.p=1.5"),
        (lambda: topology.barabasi_albert(4, 0, m=4, connected="retry"), "impossible with 4 peers"),
        (lambda: topology.erdos_renyi(4, 0, p=0.5, connected="perhaps"), "topology.connected=perhaps"),
    ],
)
def test_impossible_graphs_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


OPTIONS = (
    "ring",
    "torus",
    "complete",
    "star",
    "random_regular",
    "erdos_renyi",
    "barabasi_albert",
    "watts_strogatz",
)


@pytest.mark.parametrize("option", [*OPTIONS, "time_varying"])
def test_every_option_of_the_group_builds_its_graph(option: str) -> None:
    built = participants.topology(compose([f"topology={option}", "num_clients=20", "strategy=gossip"]))
    assert built is not None and built.num_peers == 20
    assert built.at(0).shape == (20, 20) and built.degrees().min() >= 1


# -- weights ------------------------------------------------------------------------------------------------------


def whole(m: Any) -> np.ndarray:
    return np.diag(m.own) + m.others.toarray()


@pytest.mark.parametrize("scheme", ["conservative", "uniform", "metropolis", "data_size"])
def test_rows_sum_to_one_whatever_arrived(scheme: str) -> None:
    graph = topology.barabasi_albert(30, 1, m=3, connected="retry")
    degrees, sizes = graph.degrees(), np.arange(30)
    for loss in (0.0, 0.6, 1.0):
        rng = np.random.default_rng(0)
        _, arrived = arrivals(graph.at(), range(0, 30, 1 if loss < 1 else 7), rng, loss=min(loss, 0.9))
        m = mixing(scheme, arrived, own_weight=0.3, degrees=degrees, sizes=sizes)
        w = whole(m)
        np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-14)
        assert (w >= 0).all()
        alone = np.diff(arrived.indptr) == 0
        assert (m.own[alone] == 1).all()


def test_the_weights_of_every_scheme_by_hand() -> None:
    """A star of three with peer 0 in the middle: degrees 2, 1, 1."""
    star, sizes = topology.star(3), np.array([10, 20, 30])
    of = lambda s: whole(mixing(s, star.at(), own_weight=0.4, degrees=star.degrees(), sizes=sizes))  # noqa: E731
    np.testing.assert_allclose(of("conservative"), [[0.4, 0.3, 0.3], [0.6, 0.4, 0], [0.6, 0, 0.4]])
    np.testing.assert_allclose(of("uniform"), [[1 / 3] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5]])
    third = 1 / 3
    np.testing.assert_allclose(of("metropolis"), [[third] * 3, [third, 2 * third, 0], [third, 0, 2 * third]])
    np.testing.assert_allclose(of("data_size"), [[1 / 6, 2 / 6, 3 / 6], [1 / 3, 2 / 3, 0], [1 / 4, 0, 3 / 4]])


def test_metropolis_weights_are_symmetric_and_keep_the_mean_even_when_messages_are_lost_both_ways() -> None:
    graph = topology.erdos_renyi(25, 2, p=0.3, connected="retry")
    online = [i for i in range(25) if i % 4]
    _, arrived = arrivals(graph.at(), online, np.random.default_rng(0))
    w = whole(mixing("metropolis", arrived, degrees=graph.degrees()))
    np.testing.assert_allclose(w, w.T)
    np.testing.assert_allclose(w.sum(axis=0), 1)


def test_a_sender_heard_twice() -> None:
    """Two copies from sender 1 and one from sender 2, at peer 0: each counts, but Metropolis' edges are shared."""
    arrived = csr_array(np.array([[1.0, 1.0, 1.0]]))
    who: dict[str, Any] = {"receivers": np.array([0]), "senders": np.array([1, 1, 2])}
    degrees, sizes = np.array([2, 5, 3]), np.array([10, 20, 30])
    edge = [1 / 12, 1 / 12, 1 / 4]
    expected = {
        "conservative": [1 / 6] * 3,
        "uniform": [1 / 4] * 3,
        "metropolis": edge,
        "data_size": [20 / 80, 20 / 80, 30 / 80],
    }
    for scheme, row in expected.items():
        m = mixing(scheme, arrived, degrees=degrees, sizes=sizes, **who)
        np.testing.assert_allclose(m.others.toarray()[0], row)
        assert m.own[0] == pytest.approx(1 - sum(row))


# -- messages -----------------------------------------------------------------------------------------------------


def test_only_peers_online_exchange_messages() -> None:
    sent, arrived = arrivals(topology.ring(6).at(), [0, 1, 3], np.random.default_rng(0))
    expected = np.zeros((6, 6))
    expected[0, 1] = expected[1, 0] = 1
    assert np.array_equal(sent.toarray(), expected) and np.array_equal(arrived.toarray(), expected)


def test_fanout_draws_neighbours_for_senders_receivers_or_both() -> None:
    graph = topology.complete(10).at()
    for direction, senders, receivers in (("push", {3}, None), ("pull", None, {3})):
        sent, _ = arrivals(graph, range(10), np.random.default_rng(1), fanout=3, direction=direction)
        by_sender, by_receiver = sent.toarray().sum(axis=0), sent.toarray().sum(axis=1)
        assert senders is None or set(by_sender) == senders
        assert receivers is None or set(by_receiver) == receivers
        assert len(set(by_sender)) + len(set(by_receiver)) > 2  # the other side varies
    both, _ = arrivals(graph, range(10), np.random.default_rng(1), fanout=3, direction="push_pull")
    assert np.array_equal(both.toarray(), both.toarray().T)
    assert (both.toarray().sum(axis=1) >= 3).all()


def test_messages_are_lost_with_the_given_probability() -> None:
    graph = topology.complete(60).at()
    sent, arrived = arrivals(graph, range(60), np.random.default_rng(0), loss=0.3)
    assert sent.nnz == 60 * 59 and abs(arrived.nnz / sent.nnz - 0.7) < 0.03


# -- facts --------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_ring_are_the_known_ones() -> None:
    """Conservative mixing on a ring of 8: eigenvalues 1/2 + cos(2 pi k / 8) / 2."""
    ring = topology.ring(8)
    f = facts(ring, mixing("conservative", ring.at()))
    assert f["spectral_gap"] == pytest.approx(0.5 - np.cos(np.pi / 4) / 2)
    assert f["variance_after_one_mix"] == pytest.approx(0.25 + 0.25 / 2)
    assert f["variance_limit"] == pytest.approx(1 / 8)
    assert (f["edges"], f["degree_min"], f["degree_max"], f["connected_parts"]) == (8, 2, 2, 1)


def test_the_variance_limit_follows_the_stationary_distribution_of_each_part() -> None:
    star = topology.star(5)  # pi is in proportion to degrees: 1/2 in the middle, 1/8 each outside
    f = facts(star, mixing("conservative", star.at()))
    assert f["variance_limit"] == pytest.approx(1 / 4 + 4 / 64)
    pairs = topology.Topology(4, "pairs", lambda t: nx.Graph([(0, 1), (2, 3)]))
    f = facts(pairs, mixing("conservative", pairs.at()))
    assert f["variance_limit"] == pytest.approx(1 / 2) and f["connected_parts"] == 2
    assert f["spectral_gap"] == pytest.approx(0)


def test_the_gap_of_a_large_graph_is_found_without_all_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = topology.random_regular(120, 0, degree=6, connected="retry")
    m = mixing("metropolis", graph.at(), degrees=graph.degrees())
    w = csr_array(whole(m))
    exact = spectral_gap(w)
    monkeypatch.setattr("fedsim.topology.facts.DENSE", 10)
    assert spectral_gap(w) == pytest.approx(exact, rel=1e-6)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_topology(topology.barabasi_albert(30, 0, m=2, connected="retry"), tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "graph.png").stat().st_size > 10_000
