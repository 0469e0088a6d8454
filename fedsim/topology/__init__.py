"""Who talks to whom when there is no server: graphs of peers, mixing weights, and a picture.

Options of the group ``topology`` are the functions here; each draws its graph from a key of the run's seed.
"""

from fedsim.topology.base import Topology
from fedsim.topology.graphs import (
    barabasi_albert,
    complete,
    edge_list,
    erdos_renyi,
    exponential,
    random_regular,
    ring,
    star,
    time_varying,
    torus,
    watts_strogatz,
)

__all__ = [
    "Topology",
    "barabasi_albert",
    "complete",
    "edge_list",
    "erdos_renyi",
    "exponential",
    "random_regular",
    "ring",
    "star",
    "time_varying",
    "torus",
    "watts_strogatz",
]
