"""What synchronous gossip refuses, and a graph read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from problems import (
    Recorded,
    classification,
    hashes,
    method,
)

from fedsim.errors import ClientError, ConfigError
from fedsim.exchange.payload import Message

PEERS = ("topology=ring", "clients_per_round=6")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("strategy=gossip", "clients_per_round=6"),
            "topology: this method's peers need a graph; type topology=ring",
        ),
        (("strategy=fedavg", "topology=ring"), "topology: FedAvg talks through a server"),
        (
            ("strategy=gossip", *PEERS, "strategy.target=others"),
            "strategy.target='others': choose one of received",
        ),
        (("strategy=gossip", *PEERS, "strategy.averaging=mean"), "strategy.averaging=mean: choose one of"),
        (("strategy=gossip", *PEERS, "strategy.mixing=uniform", "strategy.own_weight=0.3"), "leave it null"),
        (("strategy=gossip", *PEERS, "strategy.own_weight=1.3"), "strategy.own_weight=1.3: must be in"),
        (("strategy=gossip", *PEERS, "strategy.fanout=0"), "strategy.fanout=0"),
        (("strategy=gossip", *PEERS, "strategy.loss=1"), "strategy.loss=1"),
        (("strategy=gossip", "topology=random_regular", "topology.degree=7"), "topology.degree=7"),
        (("strategy=gossip", "topology=ring", "+topology.degree=2"), "unknown key 'topology.degree'"),
        (
            ("strategy=gossip", *PEERS, "aggregator=coordinate_median"),
            "aggregator: under strategy.target=received one hostile model would set the variance",
        ),
        (("strategy=dpsgd", "topology=time_varying"), "metropolis: needs an undirected graph"),
        (
            ("strategy=gossip", *PEERS, "strategy.scope=conv"),
            "strategy.scope=conv: fits no tensor of the model",
        ),
    ],
)
def test_impossible_settings_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification().run(*overrides)


def test_rows_for_other_clients_are_refused() -> None:
    class Misfit(Recorded):
        def round(self, server: Any, state: Any, round: Any) -> Any:
            server.exchange(Message.of(rows={"w": state["peers"]}), {"delta": "stack"}, clients=[0, 1])

    with pytest.raises(ClientError, match="message rows 'w' hold 6 rows; expected 2, one per client asked"):
        classification().run("strategy=gossip", *PEERS, strategy=Misfit(method("gossip")))


def test_run_twice_with_edges_from_a_file(tmp_path: Path) -> None:
    """The file's ring is the ring."""
    path = tmp_path / "ring.txt"
    path.write_text("\n".join(f"{i} {(i + 1) % 6}" for i in range(6)))
    given = classification().run(
        "strategy=gossip", "clients_per_round=6", "topology=edge_list", f"topology.path={path}"
    )
    assert hashes(given) == hashes(classification().run("strategy=gossip", *PEERS))
