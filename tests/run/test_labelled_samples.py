"""Samples with labels and without in runs: who has which, and that withheld labels are nowhere."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blobs import BLOBS, SHORT, run
from problems import classes, classification, hashes
from torch import Tensor, nn

from clients.base import Client
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.exchange.payload import Update
from fedsim.server.traits import Traits
from strategies.fedavg import FedAvg

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


SERVERS: list[Any] = []  # of the last run


class Semi(FedAvg):
    """FedAvg whose clients look around."""

    traits = Traits(labelled="any", unlabelled=True)

    def make_client(self) -> Client:
        return Looks()

    def init(self, server: Any) -> Any:
        SERVERS[:] = [server]
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
        assert SERVERS[0].sizes.sum() + SERVERS[0].unlabelled.sum() == len(stored["index"])


def test_where_the_server_has_the_labels_clients_have_none() -> None:
    result = semi("data.labelled={at: server, count: 30}")
    server, y = SERVERS[0], truth()
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
    assert len(SERVERS[0].data) == 12 and SERVERS[0].unlabelled.sum() == 120
    assert all(n["labelled"] == 0 for n in seen())
    x, y = classes((9,), seed=1)[0]
    semi("data.labelled={at: client, share: 0.3}", server=(x, y))
    batch = SERVERS[0].data.everything()
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
    batch = SERVERS[0].data.everything()
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


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.line(values)


def test_batches_of_trees_and_arrays_in_files_have_roles_too(tmp_path: Path) -> None:
    x, y = (torch.cat([c[i] for c in classes((60, 60))]) for i in (0, 1))
    labelled = "data.labelled={at: client, share: 0.3}"
    named = run(labelled, model=Named(), data=({"values": x}, y), validation=({"values": x[:9]}, y[:9]))
    assert "val/accuracy" in named.rows[0]
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    semi(labelled, data=(mapped, y))
    assert all(n["y"] is None and len(n["x"]) == n["unlabelled"] for n in seen())


def test_labels_that_come_with_each_sample_cannot_be_withheld() -> None:
    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 120

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.full((4,), float(i)), i % 3

    with pytest.raises(
        ConfigError, match="labels that a data set gives together with each sample cannot be withheld"
    ):
        run("data.labelled={at: client, share: 0.3}", data=Rows())
    found = run("evaluation.validation=0.2", "evaluation.client_validation=0.2", data=Rows())
    assert "val/accuracy" in found.rows[-1] and "clients_val/accuracy" in found.rows[-1]


def test_pretraining_takes_the_servers_samples_where_it_has_some() -> None:
    semi("data.labelled={at: server, count: 30}", "pretrain=central", "pretrain.training.epochs=1")
    assert all(not n["labels"] for n in seen())
