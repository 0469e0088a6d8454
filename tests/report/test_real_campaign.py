"""Real runs, really compared: a method against itself in another batch order is not called better or worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

import fedsim
from clients.base import Client
from clients.sgd import SGDClient
from fedsim.cli.main import command
from fedsim.local.job import Job
from strategies.fedavg import FedAvg

SETTINGS = (
    "data=digits", "num_clients=20", "clients_per_round=5", "partition=dirichlet", "partition.alpha=0.3", "rounds=20",
    "model=mlp", "model.hidden=[32]", "client.epochs=1", "engine=serial", "tracker=quiet", "checkpoint.every=0",
)  # fmt: skip
SEEDS = range(20)


class Reordered(SGDClient):
    """Local SGD whose mini-batches are drawn under another key."""

    def begin(self, job: Job, w: Tensor) -> Tensor:
        job.purpose = "fit in another order"
        return super().begin(job, w)


class FedAvgAgain(FedAvg):
    """FedAvg but for the order of batches."""

    def make_client(self) -> Client:
        return Reordered(weighting=self.weighting)


@pytest.mark.nightly
def test_a_method_against_itself_is_undecided_or_equivalent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = {}
    for seed in SEEDS:
        for name, strategy in (("one", None), ("other", FedAvgAgain(server_lr=1.0, weighting="samples"))):
            own = (f"seed={seed}", f"dir={tmp_path / f'{name}-{seed}'}", f"method={name}")
            named = () if strategy else ("strategy=fedavg",)
            found = fedsim.simulate([*SETTINGS, *own, *named], strategy=strategy)
            hashes[name, seed] = [row["weights_hash"] for row in found.rows]
    assert all(
        a != b for seed in SEEDS for a, b in zip(hashes["one", seed], hashes["other", seed], strict=True)
    )
    capsys.readouterr()
    for more in ((), ("--at", "last")):
        assert command(["compare", str(tmp_path), "--json", *more]) == 0
        (block,) = json.loads(capsys.readouterr().out)["blocks"]
        (c,) = block["comparisons"]
        assert c["seeds"] == list(SEEDS) and c["verdict"] in ("undecided", "equivalent"), c
        assert not [n for n in c["notes"] if "cohorts" in n or "initial weights" in n or "client." in n], c
        assert 0 < c["sd"] < 0.05
