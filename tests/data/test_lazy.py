"""Samples that are read when they are needed: what they give, and that files and owners stay where they are."""

from __future__ import annotations

import json
import os
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fedsim
from fedsim.data import containers
from fedsim.data.arrays import array
from fedsim.data.dataset import Samples
from fedsim.data.joining import admit_trees, content_hash, together
from fedsim.data.labels import TargetRules
from fedsim.data.lazy import HELD, Joined, Mapped, Parts, Read
from fedsim.data.local import LocalData
from fedsim.errors import ConfigError, DataError
from fedsim.run import modelcard

X = torch.arange(24.0).view(12, 2)


class Rows(Dataset):
    """The rows of ``X`` from ``start`` on, with their numbers."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return X[self.start + i], self.start + i


@pytest.fixture
def mapped(tmp_path: Path) -> Mapped:
    np.save(tmp_path / "x.npy", X.numpy())
    return Mapped(np.load(tmp_path / "x.npy", mmap_mode="r"))


def test_a_mapped_array_gives_its_rows_here_and_elsewhere(mapped: Mapped) -> None:
    rows = torch.tensor([11, 0, 3, 3])
    again = pickle.loads(pickle.dumps(mapped))
    assert torch.equal(mapped.take(rows), X[rows]) and torch.equal(again.take(rows), X[rows])
    assert len(pickle.dumps(mapped)) < 1000 and mapped.shape == (12, 2) and mapped.dtype == torch.float32
    found = Samples(mapped, torch.arange(12)).take(rows)
    assert torch.equal(found[0], X[rows]) and torch.equal(found[1], rows)


def test_a_mapped_arrays_content_tells_it_apart(mapped: Mapped, tmp_path: Path) -> None:
    before = content_hash([(mapped, torch.arange(12))])
    assert before == content_hash([(pickle.loads(pickle.dumps(mapped)), torch.arange(12))])
    changed = X.numpy().copy()
    changed[7, 1] += 1
    np.save(tmp_path / "y.npy", changed)
    other = Mapped(np.load(tmp_path / "y.npy", mmap_mode="r"))
    assert before != content_hash([(other, torch.arange(12))])


def test_a_mapped_array_must_be_its_whole_file(mapped: Mapped, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the whole of its file, or rows one after the other"):
        Mapped(np.load(tmp_path / "x.npy", mmap_mode="r")[:, 1:])
    state = pickle.dumps(mapped)
    (tmp_path / "x.npy").unlink()
    with pytest.raises(
        DataError, match=r"x.npy: the mapped array cannot be read .*workers need the file too"
    ):
        pickle.loads(state)


@pytest.mark.nightly
def test_rows_of_a_mapped_array_are_those_rows(tmp_path: Path) -> None:
    whole = np.arange(24_000).reshape(12_000, 2)
    held = np.memmap(tmp_path / "x.bin", dtype=np.int64, mode="w+", offset=16, shape=whole.shape)
    held[:] = whole
    held.flush()
    for rows in (slice(0, 12_000), slice(11_000, 12_000), slice(3, 5)):
        part = Mapped(held[rows])
        every = torch.arange(len(part))
        for own in (part, pickle.loads(pickle.dumps(part)), part.to("cpu")):
            assert np.array_equal(own.take(every), whole[rows])
    changed = np.memmap(tmp_path / "x.bin", dtype=np.int64, mode="c", offset=16, shape=whole.shape)
    changed[:] += 1  # of the copy in memory, not of the file
    for odd, wanted in ((changed, whole + 1), (held[:, 1], whole[:, 1]), (held[::2].copy(), whole[::2])):
        assert np.array_equal(array("x", odd), wanted)
    again = Mapped(held[1000:][10:20])
    assert np.array_equal(again.take(torch.arange(10)), whole[1010:1020])


@pytest.mark.parametrize("names", [False, True])
def test_targets_in_files_are_those_in_memory(tmp_path: Path, names: bool) -> None:
    x, y = np.random.default_rng(0).normal(size=(90, 2)).astype(np.float32), np.arange(90) % 3
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    mx, my = (np.load(tmp_path / f"{k}.npy", mmap_mode="r") for k in "xy")
    loss = {"loss": lambda out, y: nn.functional.cross_entropy(out, y["a"])} if names else {}

    def weights(x: np.ndarray, y: np.ndarray, name: str) -> dict[str, torch.Tensor]:
        parts = [(x[i : i + 30], {"a": y[i : i + 30]} if names else y[i : i + 30]) for i in (0, 30, 60)]
        settings = ["engine=serial", "rounds=1", "client.epochs=1", f"dir={tmp_path / name}"]
        return fedsim.simulate(settings, model=lambda: nn.Linear(2, 3), clients=parts, **loss).weights

    here, there = weights(x, y, "memory"), weights(mx, my, "files")
    assert all(torch.equal(here[k], there[k]) for k in here)


@pytest.mark.parametrize("named", [False, True])
def test_targets_keep_the_order_of_a_collate_function_that_sorts(named: bool) -> None:
    rows: list[Any] = [
        (torch.ones(1 + i % 7, 1), ("even", "odd")[i % 2] if named else 1 + i % 2) for i in range(14)
    ]

    def longest_first(items: list[Any]) -> tuple[torch.Tensor, Any]:
        items = sorted(items, key=lambda item: -len(item[0]))
        sums, y = torch.stack([x.sum(0) for x, _ in items]), [y for _, y in items]
        return sums, y if named else torch.tensor(y)

    part = containers.part("client 0", DataLoader(rows, collate_fn=longest_first))
    ((read, _),), classes = admit_trees([part], TargetRules(), lambda parts: [p.x for p in parts])
    x, y = read.take(torch.arange(6))
    assert classes == (("even", "odd") if named else ("1", "2")) and y.dtype == torch.int64
    assert x.flatten().tolist() == [6, 5, 4, 3, 2, 1] and y.tolist() == [1, 0, 1, 0, 1, 0]


def test_samples_that_are_dicts_have_the_labels_that_their_collate_function_gives() -> None:
    rows: list[Any] = [{"x": torch.ones(2), "kind": i % 3} for i in range(6)]
    loader = DataLoader(
        rows,
        collate_fn=lambda items: (
            torch.stack([i["x"] for i in items]),
            torch.tensor([i["kind"] for i in items]),
        ),
    )
    ((read, _),), classes = admit_trees([containers.part("data", loader)], TargetRules(), lambda parts: [])
    assert read.labels.tolist() == [0, 1, 2, 0, 1, 2] and classes == ("0", "1", "2")


def test_targets_that_a_collate_function_makes_soft_stay_so() -> None:
    rows = [(torch.ones(2), i % 2) for i in range(4)]

    def soft(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.one_hot(torch.tensor([y for _, y in items]), 2).float()
        return torch.stack([x for x, _ in items]), 0.9 * y + 0.05

    ((read, _),), _ = admit_trees(
        [containers.part("data", DataLoader(rows, collate_fn=soft))], TargetRules(), lambda parts: []
    )
    assert read.labels.tolist() == [0, 1, 0, 1] and read.take(torch.arange(4))[1].shape == (4, 2)


def test_data_larger_than_memory_stay_in_their_file(tmp_path: Path) -> None:
    """20 GB in a sparse file: reading rows all over it stays under 1.5 GB."""
    size, width = 20 << 30, 1 << 20
    with (tmp_path / "large").open("wb") as file:
        os.truncate(file.fileno(), size)
    samples = Samples(
        Mapped(np.memmap(tmp_path / "large", dtype=np.uint8, mode="r", shape=(size // width, width)))
    )
    data = LocalData(samples, torch.arange(len(samples)), torch.float32)
    process, most, seen = psutil.Process(), 0, 0
    before = process.memory_info().rss
    for block in data.blocks(16, epochs=1, steps=None, shuffle=True, rng=torch.Generator().manual_seed(0)):
        for batch in block:
            seen += batch.size
        most = max(most, process.memory_info().rss - before)
        if seen > 6000:
            break
    assert seen > 6000 and most < 1.5 * (1 << 30) and most < 4 * HELD


def test_parts_of_several_owners_lie_where_they_lay() -> None:
    parts = Parts([X[:5], X[5:6], X[6:]])
    assert len(parts) == 12 and parts.shape == (12, 2)
    for rows in ([6, 8], [4, 5, 6, 0], [11, 3, 5, 3], []):
        at = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(parts.take(at), X[at])


def test_large_inputs_are_not_copied_small_ones_are_put_together() -> None:
    large = [torch.zeros(300, 1000), torch.ones(300, 1000)]
    joined = together([(x, torch.zeros(300)) for x in large])
    assert isinstance(joined, Samples) and isinstance(joined.x, Parts) and joined.x.parts[1] is large[1]
    small = together([(X[:5], torch.zeros(5)), (X[5:], torch.zeros(7))])
    assert isinstance(small, Samples) and torch.equal(small.x, X)


def test_data_sets_of_several_owners_are_one() -> None:
    joined = Read(Joined([Rows(0, 5), Rows(5, 12)]))
    x, y = joined.take(torch.tensor([4, 5, 11, 0]))
    assert y.tolist() == [4, 5, 11, 0] and torch.equal(x, X[y])


def test_batches_of_a_collate_function_are_its_own() -> None:
    """Each batch is put together by itself, and counts its samples, whatever its tensors look like."""

    def flat(items: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        return {"values": torch.cat([x for x, _ in items])}

    data = LocalData(Read(Rows(0, 12), flat), torch.arange(12), torch.float32)
    rng = torch.Generator().manual_seed(0)
    blocks = data.blocks(5, epochs=1, steps=None, shuffle=False, rng=rng)
    batches = [b for block in blocks for b in block]
    assert [b.size for b in batches] == [5, 5, 2] and [len(b.x["values"]) for b in batches] == [10, 10, 4]
    assert batches[0].y is None


def test_a_loaders_batches_are_those_of_the_run() -> None:
    from fedsim.data.containers import part

    found = part("client 0", DataLoader(Rows(0, 12), batch_size=3, collate_fn=list)).read
    assert isinstance(found, Read) and found.collate is list


class Words(UserDict):
    """What collators of libraries return: a mapping that is no dict."""


class Graph:
    """What they put tensors into otherwise."""

    def __init__(self, nodes: torch.Tensor):
        self.nodes = nodes


class Net(nn.Linear):
    def forward(self, nodes: Graph | torch.Tensor) -> torch.Tensor:
        return super().forward(nodes.nodes if isinstance(nodes, Graph) else nodes)


@pytest.mark.parametrize("kind", [lambda x: Words(nodes=x), Graph])
def test_a_collate_function_may_return_mappings_and_objects(kind: Callable[..., Any]) -> None:
    """The same numbers as of a tensor alone; the run's card says of what kind the input is."""

    def collate(rows: list[Any]) -> Any:
        return kind(torch.stack([x for x, _ in rows])), torch.tensor([i for _, i in rows])

    def trained(way: Any) -> fedsim.RunResult:
        clients = [DataLoader(Rows(i, i + 4), collate_fn=way) for i in (0, 4, 8)]
        settings = ["engine=serial", "rounds=1", "tracker=quiet", "client.lr=0.01"]
        return fedsim.simulate(settings, model=Net(2, 12), clients=clients, test=clients[0])

    def plain(rows: list[Any]) -> Any:
        x, y = zip(*rows, strict=True)
        return torch.stack(x), torch.tensor(y)

    torch.manual_seed(0)
    expected = trained(plain)
    torch.manual_seed(0)
    found = trained(collate)
    assert found.rows[-1]["weights_hash"] == expected.rows[-1]["weights_hash"]
    card = json.loads((found.dir / "model.json").read_text())["input"]
    if kind is Graph:
        assert card == {"class": f"{Graph.__module__}.Graph"}
        with pytest.raises(ConfigError, match=r"takes a .*Graph, of which there is no example"):
            modelcard.example({"input": card})
    else:
        assert card == {"nodes": {"shape": [2], "dtype": "float32"}}
