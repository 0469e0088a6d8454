"""Validation sets in runs: what is measured on them, when, and that nobody trains on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from blobs import SHORT, run
from problems import classes, classification, hashes

from fedsim.data.dataset import Dataset, Samples
from fedsim.data.sample_roles import Portion, Roles, belongings
from fedsim.data.shards import Shards
from fedsim.errors import ConfigError, DataError
from fedsim.run.samples_left_out import of_others


def test_a_validation_set_is_measured_when_the_test_set_is_and_not_trained_on() -> None:
    plain, found = run("evaluation.every=2"), run("evaluation.every=2", "evaluation.validation=0.25")
    assert "val/accuracy" not in found.rows[0] and {"val/loss", "val/accuracy"} <= set(found.rows[1])
    assert found.rows[1]["val/accuracy"] * 30 == pytest.approx(round(found.rows[1]["val/accuracy"] * 30))
    assert found.summary["val/accuracy"] == found.rows[1]["val/accuracy"]
    with np.load(found.dir / "partition.npz") as stored, np.load(plain.dir / "partition.npz") as all_of_them:
        assert len(stored["index"]) == 90 and len(all_of_them["index"]) == 120
        first = set(stored["index"].tolist())
    with np.load(run("evaluation.validation=0.25", "seed=1").dir / "partition.npz") as stored:
        assert set(stored["index"].tolist()) == first  # whatever the seed


def test_a_validation_set_that_is_handed_over() -> None:
    x, y = classes((9,), seed=1)[0]
    clients = classes()
    found = classification(test=(x, y)).run(*SHORT, validation=(x, y))
    assert [r["val/loss"] for r in found.rows] == [r["loss"] for r in found.rows]
    assert hashes(found) == hashes(classification(test=(x, y)).run(*SHORT))
    named = [(a, [("low", "mid", "top")[int(c)] for c in b]) for a, b in clients]
    texts = [("low", "mid", "top")[int(c)] for c in y]
    again = classification(clients=named, test=(x, texts)).run(*SHORT, validation=(x.numpy(), texts))
    assert [r["val/loss"] for r in again.rows] == [r["loss"] for r in found.rows]
    with pytest.raises(DataError, match="validation, row 0: label 'high' is none of the clients' classes"):
        classification(clients=named, test=(x, texts)).run(*SHORT, validation=(x, ["high"] * 9))
    with pytest.raises(ConfigError, match=r"validation: its samples have shape \(3,\), the clients' \(4,\)"):
        classification().run(*SHORT, validation=(x[:, :3], y))
    with pytest.raises(ConfigError, match=r"evaluation.validation: a validation set was handed over"):
        classification().run(*SHORT, "evaluation.validation=0.1", validation=(x, y))


def test_clients_validate_on_samples_of_their_own() -> None:
    found = run("evaluation.client_validation=0.2", "evaluation.clients_every=1", "evaluation.holdout=0.2")
    for row in found.rows:
        assert {"clients/accuracy", "clients_val/accuracy", "clients_val/accuracy_worst_tenth"} <= set(row)
        assert row["clients_val/loss"] != row["clients/loss"]
    per_client = found.per_client
    assert len(per_client.query("metric == 'val/evaluate/accuracy' and round == 1")) == 6
    assert found.rows[0]["bytes_down"] == run("evaluation.holdout=0.2").rows[0]["bytes_down"]
    alone = run("evaluation.client_validation=0.2")
    assert "clients_val/loss" not in alone.rows[0] and "clients_val/loss" in alone.rows[1]


@pytest.mark.parametrize("method", ["fedloge", "fedproto", "local_only", "ditto", "fedavg_ft", "fedrep"])
def test_personal_methods_are_validated_as_they_are_tested(method: str) -> None:
    """The validation samples are copies of the test samples, so the numbers are the same."""
    clients = [(x.repeat(2, 1), y.repeat(2)) for x, y in classes((40, 40, 40))]
    x, y = classes((12,), seed=1)[0]
    problem = classification(clients=clients, test=(x, y))
    settings = ("evaluation.clients_every=1", "evaluation.holdout=0.5", "evaluation.client_validation=0.5")
    found = problem.run(*SHORT, *settings, f"strategy={method}", validation=(x, y))
    for row in found.rows:
        names = [k for k in row if k.startswith("val/")]
        assert names and all(row[k] == row[k.removeprefix("val/")] for k in names)
        mine = [k.removeprefix("clients/") for k in row if k.startswith("clients/")]
        assert mine and {k.removeprefix("clients_val/") for k in row if k.startswith("clients_val/")} >= set(
            mine
        ) - {k for k in mine if k.split("/")[0] in ("many", "medium", "few", "untrained")}


def test_peers_are_validated_too() -> None:
    x, y = classes((12,), seed=1)[0]
    settings = ("strategy=gossip", "topology=ring", "strategy.init_models=shared")
    found = classification(test=(x, y)).run(*SHORT, *settings, validation=(x, y))
    for row in found.rows:
        assert row["val/accuracy"] == row["accuracy"] and row["val/mean_model/loss"] == row["mean_model/loss"]
        assert "val/consensus_distance" not in row


def owned(changed: int | None = None) -> Dataset:
    """Six clients of 12 samples, told by natural ids; of one of them the inputs are others."""
    clients = classes((12,) * 6)
    x = torch.cat([3 * x + 1 if c == changed else x for c, (x, _) in enumerate(clients)])
    train = Samples(x, torch.cat([y for _, y in clients]))
    test = Samples(*classes((11,), seed=1)[0])
    return Dataset(train, test, classes=("a", "b", "c"), ids=np.repeat(np.arange(6), 12))


def test_nobody_is_validated_on_the_samples_of_who_is_excluded() -> None:
    def rows(setting: str, changed: int | None) -> Any:
        found = run("partition=natural", "evaluation.validation=0.25", setting, data=owned(changed))
        timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in found.rows]
        return timeless, found.summary["validation_samples"], Shards.load(found.dir / "partition.npz").sizes

    whole, count, sizes = rows("exclude=[]", None)
    assert count == 18 and sizes.sum() == 54 and rows("exclude=[]", 2)[0] != whole
    everything = f"exclude_samples={{2: {list(range(int(sizes[2])))}}}"
    for setting in ("exclude=[2]", everything):
        found, left, _ = rows(setting, None)
        assert found == rows(setting, 2)[0] and left == 18 - (12 - sizes[2])
    assert rows("exclude_samples={2: [0, 1]}", None)[1] == 18  # its other samples are there


def test_dealt_out_by_chance_samples_set_apart_are_nobodys() -> None:
    found = run("partition=iid", "evaluation.validation=0.25", "exclude=[2]", data=owned())
    assert found.summary["validation_samples"] == 18
    dealt = Shards.of([np.array([0, 4]), np.array([1]), np.array([3, 5])])
    ids = np.array([7, 8, 7, 9, 7, 9])
    theirs = belongings(ids, dealt, {0, 1})
    assert theirs is not None and theirs.tolist() == [True, True, True, False, True, False]
    assert (
        belongings(ids, Shards.of([np.array([0]), np.array([1, 4])]), {0}) is None
    )  # id 7 is with two clients
    assert belongings(None, dealt, {0}) is None and belongings(ids, dealt, set()) is None


def test_the_server_has_no_samples_of_who_is_excluded() -> None:
    roles = Roles(server=Portion(torch.tensor([1, 13, 30])), validation=Portion(torch.tensor([0, 25, 40])))
    dealt = Shards.of([np.arange(12 * c + 2, 12 * c + 12) for c in range(6)])
    left = of_others(roles, owned(), dealt, {2})
    assert left.server is not None and left.server.rows.tolist() == [1, 13]
    assert left.validation is not None and left.validation.rows.tolist() == [0, 40]
    with pytest.raises(
        ConfigError, match=r"exclude=\[0, 2, 3\]: all samples of evaluation.validation are theirs"
    ):
        of_others(roles, owned(), dealt, {0, 2, 3})


@pytest.mark.slow
def test_roles_are_the_same_on_workers(ray: str) -> None:
    settings = (
        "evaluation.validation=0.2",
        "evaluation.client_validation=0.2",
        "evaluation.held_out_clients=0.2",
        "evaluation.held_out_steps=2",
        "evaluation.clients_every=1",
        "evaluation.holdout=0.2",
        "data.labelled={at: client, share: 0.5}",
    )
    serial, parallel = run(*settings), run(*settings, ray, "engine.workers=2")
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in f.rows] for f in (serial, parallel)]
    assert timeless[0] == timeless[1]
