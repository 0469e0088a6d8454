"""A topology: the adjacency matrix of the peers, fixed or a function of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import networkx as nx
import numpy as np
from scipy.sparse import csr_array

from fedsim.errors import ConfigError

POLICIES = ("retry", "allow")
TRIES = 100  # draws until a random graph is given up as never connected


@dataclass
class Topology:
    """``at(t)`` (N, N) holds a one at (i, j) where peer i receives from peer j at time t; no loops.

    ``label`` says which graph it is. ``draw(t)`` gives the graph of time t; ``fixed`` ones are drawn once.
    """

    num_peers: int
    label: str
    draw: Callable[[int], nx.Graph]
    fixed: bool = True
    directed: bool = False
    absent: frozenset[int] = (
        frozenset()
    )  # peers that are never there: nobody hears them, and they hear nobody
    _last: tuple[int, csr_array] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.directed = self.graph(0).is_directed()

    def graph(self, t: int = 0) -> nx.Graph:
        """The graph of time ``t`` with the nodes 0 .. N - 1; an arc leads from sender to receiver."""
        graph = self.draw(t)
        strange = [
            v for v in graph.nodes if not (isinstance(v, int | np.integer) and 0 <= v < self.num_peers)
        ]
        if strange:
            raise ConfigError(
                f"topology={self.label}: node {strange[0]!r} is no peer; nodes are the numbers 0 to "
                f"{self.num_peers - 1} (num_clients={self.num_peers})"
            )
        graph.add_nodes_from(range(self.num_peers))
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        if self.absent:
            graph = graph.copy()  # ``draw`` may give the same one again
            graph.remove_edges_from(list(graph.edges(self.absent)))
            if graph.is_directed():
                graph.remove_edges_from(list(graph.in_edges(self.absent)))
        return graph

    def without(self, absent: frozenset[int], connected: str) -> Topology:
        """The same graph without the peers ``absent``, under the policy ``connected`` for one in several parts.

        Raises:
            ConfigError: unless the graph is a list of edges: of others nobody can say what they are without a peer.
        """
        if self.label != "edge_list":
            raise ConfigError(
                f"exclude, evaluation.held_out_clients: topology={self.label} is another graph without a peer; type "
                "topology=edge_list, whose edges stay as they are"
            )
        left = replace(self, absent=absent, _last=None)
        there = left.graph(0)
        there.remove_nodes_from(absent)
        connected_graph(lambda _: there, 1, connected, f"edge_list without peers {sorted(absent)}")
        return left

    @property
    def present(self) -> np.ndarray:
        """The peers that are there, ascending."""
        return np.array([p for p in range(self.num_peers) if p not in self.absent], dtype=np.int64)

    def at(self, t: int = 0) -> csr_array:
        """The adjacency matrix (N, N) float64 of time ``t``: rows receive, columns send."""
        t = 0 if self.fixed else t
        if self._last is None or self._last[0] != t:
            matrix = nx.to_scipy_sparse_array(
                self.graph(t), nodelist=range(self.num_peers), weight=None, dtype=np.float64, format="csr"
            )
            matrix = csr_array(matrix.T) if self.directed else csr_array(matrix)
            matrix.sum_duplicates()
            matrix.data[:] = 1.0  # parallel edges count once
            self._last = t, matrix
        return self._last[1]

    def degrees(self, t: int = 0) -> np.ndarray:
        """Number of peers (N,) that each one hears."""
        return np.diff(self.at(t).indptr)


def connected_graph(draw: Callable[[int], nx.Graph], attempts: int, policy: str, label: str) -> nx.Graph:
    """A connected graph from ``draw(attempt)``, or with ``allow`` the first one, whatever it is.

    Raises:
        ConfigError: for an unknown policy, or if no draw is connected.
    """
    if policy not in POLICIES:
        raise ConfigError(f"topology.connected={policy}: choose one of {', '.join(POLICIES)}")
    parts = 0
    for attempt in range(attempts):
        graph = draw(attempt)
        whole = nx.is_weakly_connected if graph.is_directed() else nx.is_connected
        if policy == "allow" or len(graph) == 0 or whole(graph):
            return graph
        split = nx.weakly_connected_components if graph.is_directed() else nx.connected_components
        parts = sum(1 for _ in split(graph))
    tried = "it is" if attempts == 1 else f"{attempts} draws were, the last"
    raise ConfigError(
        f"topology={label}: {tried} in {parts} separate parts; "
        "give it more edges, or topology.connected=allow"
    )
