"""The graph as a picture."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np

from fedsim.topology.base import Topology

CIRCULAR = ("ring", "complete", "star", "watts_strogatz", "exponential")
MOST = 400  # peers that can still be told apart


def draw_topology(topology: Topology, path: Path) -> None:
    """Save a picture of the graph at time 0: peers coloured by degree, and how often each degree occurs."""
    from matplotlib.figure import Figure

    graph, degrees = topology.graph(0), topology.degrees()
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    few = len(graph) <= MOST
    place = (
        nx.circular_layout(graph) if topology.label in CIRCULAR or not few else _spread(topology.label, graph)
    )
    order = sorted(graph)
    nx.draw_networkx_edges(
        graph, place, ax=left, alpha=max(0.05, min(0.6, 60 / max(1, graph.size()))), width=0.8
    )
    points = np.array([place[v] for v in order])
    size = max(4.0, min(120.0, 4000 / max(1, len(graph))))
    dots = left.scatter(*points.T, c=degrees, s=size, cmap="viridis", zorder=2)
    left.set_title(
        f"{topology.label}: {len(graph)} peers, {graph.size()} edges" + ("" if topology.fixed else ", t = 0")
    )
    left.set_axis_off()
    figure.colorbar(dots, ax=left, label="peers heard", shrink=0.7)
    values, counts = np.unique(degrees, return_counts=True)
    right.bar(values, counts, width=0.8, color="#3b6ea5")
    right.set_xlabel("peers heard")
    right.set_ylabel("number of peers")
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)


def _spread(label: str, graph: nx.Graph) -> dict[int, np.ndarray]:
    kind = nx.kamada_kawai_layout if len(graph) <= 100 else nx.spring_layout
    return kind(graph, **({"seed": 0} if kind is nx.spring_layout else {}))  # type: ignore[no-any-return]
