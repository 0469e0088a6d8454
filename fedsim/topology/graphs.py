"""The graphs of the group ``topology``: each function takes the number of peers and the run's seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx

from fedsim.config.textfile import read_text
from fedsim.errors import ConfigError
from fedsim.rng import key
from fedsim.topology.base import TRIES, Topology, connected_graph


def _fixed(graph: nx.Graph, num_peers: int, label: str) -> Topology:
    return Topology(num_peers, label, lambda t: graph)


def _random(
    label: str, num_peers: int, seed: int, connected: str, build: Callable[[int], nx.Graph]
) -> Topology:
    """A seeded random graph, redrawn under further keys until it is connected."""

    def draw(attempt: int) -> nx.Graph:
        return build(key(seed, f"topology/{label}", attempt) >> 32)

    try:
        return _fixed(connected_graph(draw, TRIES, connected, label), num_peers, label)
    except nx.NetworkXException as e:
        raise ConfigError(f"topology={label}: impossible with {num_peers} peers: {e}") from None


def ring(num_peers: int) -> Topology:
    """Each peer between two others."""
    graph = nx.cycle_graph(num_peers) if num_peers > 1 else nx.empty_graph(num_peers)
    return _fixed(graph, num_peers, "ring")


def torus(num_peers: int, *, rows: int | None) -> Topology:
    """A grid whose opposite sides are joined; by default with as many rows as the largest divisor up to sqrt(N)."""
    fitting = [r for r in range(1, math.isqrt(num_peers) + 1) if num_peers % r == 0]
    rows = fitting[-1] if rows is None else rows
    if rows < 1 or num_peers % rows:
        raise ConfigError(f"topology.rows={rows}: does not divide num_clients={num_peers}; try {fitting[-1]}")
    grid = nx.grid_2d_graph(rows, num_peers // rows, periodic=True)
    return _fixed(nx.convert_node_labels_to_integers(grid, ordering="sorted"), num_peers, "torus")


def complete(num_peers: int) -> Topology:
    """Everybody hears everybody."""
    return _fixed(nx.complete_graph(num_peers), num_peers, "complete")


def star(num_peers: int) -> Topology:
    """Peer 0 in the middle."""
    return _fixed(nx.star_graph(num_peers - 1), num_peers, "star")


def random_regular(num_peers: int, seed: int, *, degree: int, connected: str) -> Topology:
    """Uniform among graphs in which every peer has ``degree`` neighbours; ``degree * N`` must be even."""
    if not 0 <= degree < num_peers or degree * num_peers % 2:
        raise ConfigError(
            f"topology.degree={degree}: with num_clients={num_peers} it must be below that, and one of the two even"
        )
    return _random(
        "random_regular",
        num_peers,
        seed,
        connected,
        lambda s: nx.random_regular_graph(degree, num_peers, seed=s),
    )


def erdos_renyi(num_peers: int, seed: int, *, p: float, connected: str) -> Topology:
    """Each pair is joined with probability ``p``."""
    _probability("p", p)
    return _random(
        "erdos_renyi", num_peers, seed, connected, lambda s: nx.gnp_random_graph(num_peers, p, seed=s)
    )


def barabasi_albert(num_peers: int, seed: int, *, m: int, connected: str) -> Topology:
    """Scale-free: each new peer joins ``m`` others, preferring those with many neighbours."""
    return _random(
        "barabasi_albert",
        num_peers,
        seed,
        connected,
        lambda s: nx.barabasi_albert_graph(num_peers, m, seed=s),
    )


def watts_strogatz(num_peers: int, seed: int, *, k: int, p: float, connected: str) -> Topology:
    """Small world: a ring of ``k`` nearest neighbours whose edges are rewired with probability ``p``."""
    _probability("p", p)
    return _random(
        "watts_strogatz",
        num_peers,
        seed,
        connected,
        lambda s: nx.watts_strogatz_graph(num_peers, k, p, seed=s),
    )


def edge_list(num_peers: int, *, path: str | None, directed: bool, connected: str) -> Topology:
    """A text file with one edge a line, two peer numbers; ``#`` starts a comment. Directed: from sender to receiver."""
    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"topology.path={path}: no such file; expected lines of two peer numbers, e.g. '0 3'"
        )
    kind = nx.DiGraph if directed else nx.Graph
    graph = kind()
    graph.add_nodes_from(range(num_peers))
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"topology.path={path}: cannot be read ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            a, b = map(int, words[:2])
        except ValueError:
            raise ConfigError(
                f"{path}, line {number}: {line!r} is no edge; expected two peer numbers, e.g. '0 3'"
            ) from None
        if not (0 <= a < num_peers and 0 <= b < num_peers):
            raise ConfigError(
                f"{path}, line {number}: edge {a} {b}, but peers are 0 to {num_peers - 1} (num_clients={num_peers})"
            )
        graph.add_edge(a, b)
    return _fixed(connected_graph(lambda _: graph, 1, connected, "edge_list"), num_peers, "edge_list")


def time_varying(num_peers: int, seed: int, *, graph: Callable[..., nx.Graph]) -> Topology:
    """``graph(t, num_peers, seed)`` gives the networkx graph of round (or tick) t; it must depend on nothing else."""
    if not callable(graph):
        raise ConfigError(
            f"topology.graph={graph}: expected a function of (t, num_peers, seed), named by _target_ with "
            "_partial_: true"
        )

    def draw(t: int) -> nx.Graph:
        drawn: Any = graph(t, num_peers, seed)
        if not isinstance(drawn, nx.Graph):
            raise ConfigError(
                f"topology.graph: gave {type(drawn).__name__} at t={t}, expected a networkx graph"
            )
        return drawn

    label = getattr(getattr(graph, "func", graph), "__name__", "time_varying")
    return Topology(num_peers, label, draw, fixed=False)


def exponential(t: int, num_peers: int, seed: int) -> nx.DiGraph:
    """One-peer exponential graph: at time t peer i hears peer ``i - 2^(t mod log2 N)`` alone.

    Assran, Loizou, Ballas, Rabbat: Stochastic Gradient Push for Distributed Deep Learning, ICML 2019.
    """
    hops = max(1, math.ceil(math.log2(num_peers))) if num_peers > 1 else 1
    step = 2 ** (t % hops)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(num_peers))
    graph.add_edges_from((i, (i + step) % num_peers) for i in range(num_peers) if step % num_peers)
    return graph


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"topology.{name}={value}: must be in [0, 1]")
