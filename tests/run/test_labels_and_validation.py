"""Roles in runs: what is measured on what, whose labels are where, and that withheld ones are nowhere."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import classes, classification, hashes, network
from torch import Tensor

from clients.base import Client
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError, DataError
from fedsim.exchange.payload import Update
from fedsim.server.traits import Traits
from strategies.fedavg import FedAvg

BLOBS = (
    "data=blobs",
    "data.num_samples=120",
    "data.num_test=20",
    "data.num_features=4",
    "data.num_classes=3",
    "partition=iid",
)
SHORT = ("rounds=2", "clients_per_round=3", "client.epochs=1", "client.batch_size=4", "evaluation.every=1")


def run(*settings: str, **given: Any) -> Any:
    import fedsim

    return fedsim.simulate(
        ["engine=serial", "tracker=quiet", "checkpoint.every=0", "num_clients=6", *BLOBS, *SHORT, *settings],
        model=network(),
        **given,
    )


# -- validation ---------------------------------------------------------------------------------------------------


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


# -- labelled, unlabelled -----------------------------------------------------------------------------------------


NOTES = Path(tempfile.mkdtemp(prefix="looks-"))


class Looks(Client):
    """Trains on what has labels and notes what it can see, in a file: it may keep nothing."""

    def fit(self, job: Any) -> Update:
        own = job.unlabelled
        batch = own.everything()
        steps = [b.y for b in job.batches("unlabelled", data=own)]
        note = {
            "client": job.client,
            "labelled": len(job.data),
            "unlabelled": len(own),
            "y": batch.y,
            "x": batch.x,
            "steps": steps,
            "labels": set(_labels(job)),
            "rows": own.index,
        }
        torch.save(note, NOTES / f"{job.round}-{job.client}.pt")
        if not len(job.data):
            return Update({"delta": torch.zeros_like(job.anchor)}, weight=len(own))
        return super().fit(job)


def _labels(job: Any) -> list[tuple[int, int]]:
    """(row, label) of every integer tensor or array as long as the training set that can be reached from ``job``."""
    found, todo, done = [], [job, job.unlabelled, job.unlabelled.samples, job.data], set()
    while todo:
        thing = todo.pop()
        if id(thing) in done or isinstance(thing, type | str | bytes | int | float):
            continue
        done.add(id(thing))
        if isinstance(thing, Tensor | np.ndarray):
            values = thing.detach().numpy() if isinstance(thing, Tensor) else thing
            if values.ndim == 1 and values.dtype == np.int64 and len(values) == 120:
                found += [(row, int(v)) for row, v in enumerate(values) if 0 <= v < 3]
            continue
        if isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            todo += list(thing)
        todo += list(getattr(thing, "__dict__", {}).values())
        todo += [c.cell_contents for c in getattr(thing, "__closure__", None) or ()]
        todo += [getattr(thing, s, None) for s in getattr(type(thing), "__slots__", ())]
        if isinstance(thing, FederatedData):
            todo += [thing.client(c, torch.float32) for c in range(thing.num_clients)]
            todo += [thing.unlabelled(c, torch.float32) for c in range(thing.num_clients)]
            todo += [getattr(thing, f.name) for f in dataclasses.fields(thing)]
    return found


class Semi(FedAvg):
    """FedAvg whose clients look around."""

    traits = Traits(labelled="any", unlabelled=True)

    def make_client(self) -> Client:
        return Looks()

    def init(self, server: Any) -> Any:
        type(self).server = server
        return super().init(server)


def semi(*settings: str, **given: Any) -> Any:
    for old in NOTES.iterdir():
        old.unlink()
    return run(*settings, strategy=Semi(server_lr=1.0, weighting="samples"), **given)


def seen() -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=False) for path in sorted(NOTES.iterdir())]


def truth() -> Tensor:
    from fedsim.data.sources import blobs

    return blobs(num_samples=120, num_test=20, num_features=4, num_classes=3, separation=3.0, seed=0).train.y


def test_clients_have_samples_with_labels_and_samples_without_and_cannot_tell_theirs() -> None:
    result = semi("data.labelled={at: client, share: 0.3}", "evaluation.holdout=0.2")
    notes, y = seen(), truth()
    assert len(notes) == 6
    for note in notes:
        assert note["labelled"] >= 1 and note["unlabelled"] > note["labelled"]
        assert note["y"] is None and note["steps"] and all(b is None for b in note["steps"])
        assert len(note["x"]) == note["unlabelled"]
        told = {row for row, label in note["labels"] if label == int(y[row])}
        assert told and not told & set(note["rows"].tolist())
    with np.load(result.dir / "partition.npz") as stored:
        assert Semi.server.sizes.sum() + Semi.server.unlabelled.sum() == len(stored["index"])


def test_where_the_server_has_the_labels_clients_have_none() -> None:
    result = semi("data.labelled={at: server, count: 30}")
    server, y = Semi.server, truth()
    batch = server.data.everything()
    assert len(server.data) == 30 and torch.bincount(batch.y).tolist() == [10, 10, 10]
    assert torch.equal(batch.y, y[server.data.index])
    assert not server.sizes.any() and server.unlabelled.sum() == 90 and server.class_counts.sum() == 0
    with np.load(result.dir / "partition.npz") as stored:
        assert not set(stored["index"].tolist()) & set(server.data.index.tolist())
    notes = seen()
    for note in notes:
        assert note["labelled"] == 0 and note["unlabelled"] > 0 and note["y"] is None
        assert not note["labels"]
    client, mine = notes[0]["client"], y[notes[0]["rows"]]
    guesses = mine.clone()
    guesses[0], guesses[1] = (mine[0] + 1) % 3, -1
    found = server.pseudo_labels(client, guesses)
    n = len(mine)
    assert found["kept"] == (n - 1) / n and found["accuracy"] == (n - 2) / (n - 1)
    with pytest.raises(Exception, match="pseudo labels of shape"):
        server.pseudo_labels(client, guesses[:-1])


def test_the_server_has_samples_of_its_own_from_a_source_or_from_python() -> None:
    source = "+data@data.server=blobs"
    more = ("data.server.num_samples=12", "data.server.num_features=4", "data.server.num_classes=3")
    semi(source, *more, "data.server.seed=7", "data.labelled.at=server")
    assert len(Semi.server.data) == 12 and Semi.server.unlabelled.sum() == 120
    assert all(n["labelled"] == 0 for n in seen())
    x, y = classes((9,), seed=1)[0]
    semi("data.labelled={at: client, share: 0.3}", server=(x, y))
    batch = Semi.server.data.everything()
    assert torch.equal(batch.x, x) and torch.equal(batch.y, y)
    with pytest.raises(ConfigError, match=r"data.server: its samples have shape \(8,\), the clients' \(4,\)"):
        semi(source, "data.server.num_samples=12", "data.labelled={at: client, share: 0.3}")


def test_samples_from_elsewhere_are_embedded_as_the_others() -> None:
    import fedsim

    x, y = classes((9,), seed=1)[0]
    settings = [
        "engine=serial",
        "tracker=quiet",
        "num_clients=6",
        "model=linear",
        "encoder=random_features",
        *BLOBS,
    ]
    method = Semi(server_lr=1.0, weighting="samples")
    labelled = "data.labelled={at: client, share: 0.3}"
    found = fedsim.simulate([*settings, *SHORT, labelled], strategy=method, server=(x, y), validation=(x, y))
    batch = Semi.server.data.everything()
    assert batch.x.shape[1] == found.weights[next(iter(found.weights))].shape[1] != 4
    assert "val/accuracy" in found.rows[0]


def test_which_labels_are_there_changes_no_partition_and_hangs_on_the_seed() -> None:
    first, again = (semi("data.labelled={at: client, share: 0.3}").summary for _ in range(2))
    plain = run().summary
    assert (
        first["partition_hash"] == plain["partition_hash"] and first["weights_hash"] == again["weights_hash"]
    )
    assert first["weights_hash"] != plain["weights_hash"]


def test_labels_of_unlabelled_samples_change_no_bit() -> None:
    clients = classes((20, 20, 20, 20, 20, 20))
    problem = classification(clients=clients, settings=SHORT)
    strategy = lambda: Semi(server_lr=1.0, weighting="samples")  # noqa: E731
    setting = "data.labelled={at: client, share: 0.3, per_class: false}"
    first = problem.run(setting, strategy=strategy())
    hidden = {n["client"]: n["rows"] for n in seen()}
    y = torch.cat([b for _, b in clients])
    for rows in hidden.values():
        y[rows] = (y[rows] + 1) % 3
    changed = [(x, part) for (x, _), part in zip(clients, y.split(20), strict=True)]
    again = classification(clients=changed, settings=SHORT).run(setting, strategy=strategy())
    assert hashes(first) == hashes(again)


def test_a_method_says_who_must_have_labels() -> None:
    class SemiFL(Semi):
        traits = Traits(labelled="server", unlabelled=True)

    method = SemiFL(server_lr=1.0, weighting="samples")
    for setting in ("data.labelled={at: client, share: 0.3}", "seed=0"):
        with pytest.raises(ConfigError, match=r"^semifl needs data\.labelled\.at=server$"):
            run(setting, strategy=method)
    with pytest.raises(ConfigError, match="fedavg trains on clients' labelled samples, but they have none"):
        run("data.labelled={at: server, count: 30}")
    with pytest.raises(ConfigError, match=r"semi needs samples without labels; type data.labelled.at=client"):
        semi()
    with pytest.raises(ConfigError, match=r"data.labelled.at=client: how many"):
        run("data.labelled.at=client")
    with pytest.raises(ConfigError, match=r"data.labelled.at=server: how many"):
        semi("data.labelled.at=server")
    with pytest.raises(ConfigError, match=r"traits.labelled='nobody': choose one of client, server, any"):
        Traits(labelled="nobody")  # type: ignore[arg-type]


def test_labels_only_is_a_reference_for_any_method() -> None:
    found = run("data.labelled={at: client, share: 0.3}", "data.labelled.classes=[0,1]")
    assert found.rows[-1]["accuracy"] >= 0 and found.summary["status"] == "done"


def test_settings_of_roles_are_in_the_key_and_those_of_before_keep_theirs() -> None:
    from composing import compose_quickly

    from fedsim.run.key import run_key

    plain = run_key(compose_quickly([]))
    for setting in (
        "exclude=[1]",
        "evaluation.validation=0.1",
        "evaluation.client_validation=0.1",
        "evaluation.held_out_clients=0.1",
        "data.labelled={at: client, share: 0.1}",
    ):
        assert run_key(compose_quickly([setting])) != plain
    for setting in ("exclude=[]", "evaluation.validation=0", "data.labelled.at=null"):
        assert run_key(compose_quickly([setting])) == plain
